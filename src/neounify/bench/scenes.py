"""SceneBench's outcomes as a result of the common format, so that two models compare by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neounify.bench.result import CaseScore, Result, versions
from neounify.scenes.bench import Outcome

STRICT, HELD_OUT = "strict", "held_out"
"""Parts: right in all that was asked, and the same of cases that are held out of training alone."""


def scene_result(outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> Result:
    """The result of SceneBench; `about` is that of its report.

    World, cases and seed draw the cases, so they stand for the prompts.
    """
    cases = []
    for outcome in outcomes:
        category = outcome.score.category
        for number, example in enumerate(outcome.examples):
            right = float(example.verdict.correct)
            is_held_out = bool(outcome.held_out) and outcome.held_out[number]
            parts = {STRICT: right} | ({HELD_OUT: right} if is_held_out else {})
            cases.append(CaseScore(f"{category}/{number}", category, parts))
    drawn = ("world", "cases", "seed")
    common = {
        "benchmark": "scenebench",
        "prompts": {name: about[name] for name in drawn},
        "judge": {"kind": "scenes"},
        "versions": versions(),
    }
    settings = {name: value for name, value in about.items() if name not in drawn}
    return Result(common | settings, tuple(cases))
