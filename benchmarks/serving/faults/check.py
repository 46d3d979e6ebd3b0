"""One thing that must hold, and whether it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.serving.report import markdown
from benchmarks.serving.sending import Outcome
from benchmarks.serving.stats import error_name


@dataclass(frozen=True, kw_only=True)
class Check:
    """`seen` says what was observed."""

    scenario: str
    what: str
    passed: bool
    seen: str


def checks_table(checks: Sequence[Check]) -> str:
    """Markdown."""
    rows = [[c.scenario, c.what, "pass" if c.passed else "**FAIL**", c.seen] for c in checks]
    return markdown(("fault", "must hold", "", "seen"), rows)


def tally(outcomes: Iterable[Outcome]) -> str:
    """How requests ended, like "3 × answered, 1 × 503 engine_restarting (Retry-After 2)"."""
    counted = Counter(_ending(outcome) for outcome in outcomes)
    return ", ".join(f"{count} × {ending}" for ending, count in counted.items()) or "none"


def _ending(outcome: Outcome) -> str:
    if outcome.ok:
        return "answered"
    retry = "" if outcome.retry_after is None else f" (Retry-After {outcome.retry_after})"
    return error_name(outcome) + retry


def is_refusal(outcome: Outcome, status: int) -> bool:
    """Whether a request was refused with that status and a Retry-After in seconds."""
    after = outcome.retry_after or ""
    return outcome.status == status and after.isdecimal() and int(after) >= 1


def is_engine_death(outcome: Outcome) -> bool:
    """A 503 with Retry-After, or that error at the end of a stream that had begun."""
    broke_off = outcome.status == 200 and outcome.error == "engine_restarting"
    return broke_off or is_refusal(outcome, 503)
