"""Outcomes of SceneBench and MotionBench as results of the common format, to compare by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neounify.bench.result import CaseScore, Result, versions
from neounify.scenes.bench import Outcome

STRICT, HELD_OUT = "strict", "held_out"
"""Parts: right in all that was asked, and the same of cases that are held out of training alone."""


def scene_result(
    outcomes: Sequence[Outcome], about: Mapping[str, Any], benchmark: str = "scenebench"
) -> Result:
    """The result of SceneBench, or of MotionBench; `about` is that of its report.

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
        "benchmark": benchmark,
        "prompts": {name: about[name] for name in drawn},
        "judge": {"kind": "scenes"},
        "versions": versions(),
    }
    settings = {name: value for name, value in about.items() if name not in drawn}
    return Result(common | settings, tuple(cases))
