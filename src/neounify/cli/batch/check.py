"""Check of a batch's lines before the model is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neounify.cli.batch.lines import BadLine, Line, Options, read_lines
from neounify.cli.batch.results import Results
from neounify.cli.display import Display
from neounify.cli.errors import CliError
from neounify.errors import NeounifyError

MAX_CHECKED = 1000
"""Lines that are checked; the others are checked when their turn comes."""
MAX_SECONDS = 5.0
"""Time for the check, which decodes images, in seconds; it ends after that many lines as well."""

MAX_NAMED = 3
"""Unusable lines named one by one."""


def check_lines(
    path: Path,
    defaults: Options,
    check: Callable[[Line[Options]], None],
    display: Display,
    results: Results,
    *,
    images: bool,
) -> None:
    """Report on stderr how many lines cannot be done.

    `check` raises a NeounifyError for a line that would fail. Raises CliError when no line can be
    done and no earlier run has done any.
    """
    bad: list[BadLine] = []
    usable = results.any_done
    end = time.monotonic() + MAX_SECONDS
    for number, line in enumerate(read_lines(path, defaults, images=images)):
        if number >= MAX_CHECKED or time.monotonic() > end:
            usable = True
            break
        reason = _problem(line, check)
        if reason is None:
            usable = True
        else:
            bad.append(BadLine(line.number, reason, line.id))
    if not usable:
        named = "\n".join(_names(bad)) or "it holds no lines"
        raise CliError(f"--input {path}: nothing can be done\n{named}")
    if bad:
        lines = "1 line" if len(bad) == 1 else f"{len(bad)} lines"
        display.note(f"{lines} of {path} cannot be done, the first is line {bad[0].number}")


def _problem(line: Line[Any] | BadLine, check: Callable[[Line[Any]], None]) -> str | None:
    if isinstance(line, BadLine):
        return line.reason
    try:
        check(line)
    except NeounifyError as error:
        return str(error)
    return None


def _names(bad: list[BadLine]) -> list[str]:
    named = [f"line {line.number}: {line.reason}" for line in bad[:MAX_NAMED]]
    more = len(bad) - len(named)
    return [*named, f"and {more} more"] if more else named
