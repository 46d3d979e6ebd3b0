"""Optional dependencies: what to run when one is missing."""

from __future__ import annotations

from typing import Literal

Extra = Literal["grammar", "serve", "ray", "train", "watermark"]


def install_command(extra: Extra) -> str:
    """The command that installs an extra, in the folder of a clone.

    The only place that spells it: the package is not published under any name.
    """
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def missing_extra(what: str, extra: Extra, error: ImportError) -> str:
    """A message for an extra that is not installed; `what` is what needs it, in the plural."""
    return f"{what} need the extra {extra!r}; in the repository: {install_command(extra)} ({error})"
