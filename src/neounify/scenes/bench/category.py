"""A category on its way: its cases are taken in batches, judged and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from neounify.scenes.bench.checks import Verdict
from neounify.scenes.bench.report import Score, score

Pixels = NDArray[np.uint8]

THOUGHT_RIGHT = "thought_right"
"""The measure that says how many thoughts list a scene that fits what was asked, 0 to 1."""


@dataclass(frozen=True)
class Example:
    """One case as it went: what was asked, what came back, what the checker said.

    `picture` is what was painted (a story's pictures side by side) or asked about, `source` what
    was to be edited; uint8 [h, w, 3]. A wrong thought does not make the verdict wrong.
    """

    asked: str
    verdict: Verdict
    picture: Pixels | None = None
    source: Pixels | None = None
    answer: str | None = None
    thought: str | None = None
    thought_verdict: Verdict | None = None


@dataclass(frozen=True)
class Outcome:
    """One category: its score, its measures (plain numbers), and all its cases."""

    score: Score
    examples: list[Example]
    measures: dict[str, float] = field(default_factory=dict)


def nothing(examples: Sequence[Example]) -> dict[str, float]:
    """No measures beside the score."""
    return {}


@dataclass(frozen=True)
class Category:
    """Cases still to be measured.

    `held_out` says of each whether training never shows it, `take` asks the subject for some of
    them and judges what comes back, `measure` sums up what a verdict does not hold. `forms` says
    of each in which form of its task it is asked; empty where there is one.
    """

    name: str
    held_out: Sequence[bool]
    take: Callable[[range], list[Example]]
    measure: Callable[[Sequence[Example]], dict[str, float]] = nothing
    batch_size: int = 1
    forms: Sequence[str] = ()

    def run(self, done: Callable[[int], None] | None = None) -> Outcome:
        """Measure all cases; `done` is told after each batch how many are."""
        number, examples = len(self.held_out), list[Example]()
        for start in range(0, number, self.batch_size):
            examples += self.take(range(start, min(number, start + self.batch_size)))
            if done is not None:
                done(len(examples))
        found = score(self.name, [e.verdict for e in examples], self.held_out, self.forms)
        return Outcome(found, examples, self.measure(examples) | _thinking(examples))


def _thinking(examples: Sequence[Example]) -> dict[str, float]:
    right = [e.thought_verdict.correct for e in examples if e.thought_verdict is not None]
    return {THOUGHT_RIGHT: sum(right) / len(right)} if right else {}
