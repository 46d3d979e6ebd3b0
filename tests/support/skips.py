"""Pytest hooks that skip slow tests unless asked for, and say at the end what was skipped and why.

Loaded by `conftest.py`, or with `-p support.skips`. Works the same under pytest-xdist, whose
workers send their reports to the process that writes the summary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

SLOW = "slow: `.ci/run` runs them, and so does `pytest -m slow`"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked slow, unless an expression after -m speaks of them."""
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason=SLOW))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line per reason, most tests first."""
    for reason, count in reasons(terminalreporter.stats.get("skipped", ())).most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


def reasons(reports: Iterable[Any]) -> Counter[str]:
    """How many tests, or whole modules, were skipped for each reason."""
    found: Counter[str] = Counter()
    for report in reports:
        _, _, text = report.longrepr
        reason = str(text).removeprefix("Skipped: ")
        whole = isinstance(report, pytest.CollectReport)
        found[f"{reason} (all tests of {report.nodeid})" if whole else reason] += 1
    return found
