"""Reasons why samples cannot be used: kinds of errors, counts of them, and their share."""

from __future__ import annotations

import re
from collections import Counter

MAX_REASON_CHARS = 100


def reason_of(error: Exception) -> str:
    """The kind of an error, to count by: its first sentence without names and numbers."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, str) and reason:  # a DataError that says it
        return reason
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", " ".join(text[:2000].split()))
    text = re.split(r"\. (?=[A-Z])", re.sub(r"\d[\d,.]*(?<![,.])", "N", text))[0]
    text = "".join(c for c in text if c.isprintable()) or type(error).__name__
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 1] + "…"


MAX_REASONS_SHOWN = 5


def counted(reasons: Counter[str]) -> str:
    """The most frequent reasons, for a line: "12 the caption is empty, 3 …"."""
    shown = [f"{count:,} {reason}" for reason, count in reasons.most_common(MAX_REASONS_SHOWN)]
    rest = reasons.total() - sum(n for _, n in reasons.most_common(MAX_REASONS_SHOWN))
    return ", ".join(shown) + (f", {rest:,} others" if rest else "")


def too_many_skipped(name: str, tried: int, reasons: Counter[str], limit: float) -> str:
    """The error message for a source above its `max_skipped`."""
    skipped = reasons.total()
    return (
        f"{name}: {skipped:,} of {tried:,} samples cannot be used ({skipped / tried:.1%}), more "
        f"than max_skipped allows ({limit:.1%}): {counted(reasons)}"
    )
