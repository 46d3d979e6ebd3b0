"""Pytest hooks that leave some tests out unless asked for, and say at the end what was skipped.

Loaded by `conftest.py`, or with `-p support.skips`. Works the same under pytest-xdist, whose
workers send their reports to the process that writes the summary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

LEFT_OUT = {
    "slow": "slow: `.ci/run` runs them, and so does `pytest -m slow`",
    "browser": "in a browser: `.ci/run` runs them, and so does `scripts/browser-tests`",
}
"""By marker, why its tests do not run with all others."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is left out, unless a file is named or an expression after -m asks for it."""
    if any(argument.partition("::")[0].endswith(".py") for argument in config.args):
        return
    for marker, reason in LEFT_OUT.items():
        if marker in config.option.markexpr:
            continue
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line per reason, most tests first."""
    for reason, count in reasons(terminalreporter.stats.get("skipped", ())).most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


def reasons(reports: Iterable[Any]) -> Counter[str]:
    """How many tests, or whole modules, were skipped for each reason."""
    counts: Counter[str] = Counter()
    for report in reports:
        _, _, text = report.longrepr
        reason = str(text).removeprefix("Skipped: ")
        whole = isinstance(report, pytest.CollectReport)
        counts[f"{reason} (all tests of {report.nodeid})" if whole else reason] += 1
    return counts
