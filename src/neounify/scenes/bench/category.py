"""Categories of SceneBench: cases run in batches, judged and counted as scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neounify.data.sample import DataError
from neounify.evaluate.metrics import Rate
from neounify.scenes.bench.checks import Verdict

Pixels = NDArray[np.uint8]

THOUGHT_RIGHT = "thought_right"
"""The measure that says how many thoughts list a scene that fits what was asked, 0 to 1."""


@dataclass(frozen=True)
class Score:
    """One category: strict, on held-out cases alone (None if it has none), and by attribute.

    `forms` splits the strict rate by the form of what was asked, where a category has several.
    """

    category: str
    strict: Rate
    held_out: Rate | None
    attributes: Mapping[str, Rate]
    forms: Mapping[str, Rate] = field(default_factory=dict)

    @property
    def seen(self) -> Rate | None:
        """Strict, on the cases that are not held out; None if all are."""
        if self.held_out is None:
            return self.strict
        number = self.strict.number - self.held_out.number
        return Rate(self.strict.correct - self.held_out.correct, number) if number else None

    def to_json(self) -> dict[str, Any]:
        """The score as plain data."""
        return {
            "category": self.category,
            "strict": self.strict.to_json(),
            "seen": self.seen.to_json() if self.seen else None,
            "held_out": self.held_out.to_json() if self.held_out else None,
            "attributes": {name: rate.to_json() for name, rate in self.attributes.items()},
            "forms": {name: rate.to_json() for name, rate in self.forms.items()},
        }


def score(
    category: str,
    verdicts: Sequence[Verdict],
    held_out: Sequence[bool],
    forms: Sequence[str] = (),
) -> Score:
    """Count the verdicts of a category; `held_out` marks the cases that training never shows.

    `forms` gives each case's form; empty where the category has but one.
    """
    if not verdicts or len(verdicts) != len(held_out) or len(forms) not in (0, len(verdicts)):
        raise DataError(
            f"{category}: {len(verdicts)} verdicts for {len(held_out)} cases, {len(forms)} forms"
        )
    names = list(dict.fromkeys(name for v in verdicts for name in v.attributes))
    held_out_correct = [v.correct for v, is_held in zip(verdicts, held_out, strict=True) if is_held]
    attributes = {}
    for name in names:
        asked = [v.attributes[name] for v in verdicts if name in v.attributes]
        attributes[name] = Rate(sum(asked), len(asked))
    return Score(
        category,
        Rate(sum(v.correct for v in verdicts), len(verdicts)),
        Rate(sum(held_out_correct), len(held_out_correct)) if held_out_correct else None,
        attributes,
        _by_form(verdicts, forms),
    )


def _by_form(verdicts: Sequence[Verdict], forms: Sequence[str]) -> dict[str, Rate]:
    by_form: dict[str, list[bool]] = {form: [] for form in sorted(set(forms))}
    for form, verdict in zip(forms, verdicts, strict=False):
        by_form[form].append(verdict.correct)
    return {form: Rate(sum(right), len(right)) for form, right in by_form.items()}


@dataclass(frozen=True)
class Example:
    """One case as it went: what was asked, what came back, what the checker said.

    `image` is the generated image (a story's side by side) or the one asked about, `source` what
    was to be edited; uint8 [h, w, 3]. A wrong thought does not make the verdict wrong.
    """

    asked: str
    verdict: Verdict
    image: Pixels | None = None
    source: Pixels | None = None
    answer: str | None = None
    thought: str | None = None
    thought_verdict: Verdict | None = None


@dataclass(frozen=True)
class Outcome:
    """One category: its score, its measures (plain numbers), and all its cases.

    `held_out` says of each case whether training never shows it.
    """

    score: Score
    examples: list[Example]
    measures: dict[str, float] = field(default_factory=dict)
    held_out: Sequence[bool] = ()


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
        """Measure all cases; `done` is called after each batch with the cases finished."""
        number, examples = len(self.held_out), list[Example]()
        for start in range(0, number, self.batch_size):
            examples += self.take(range(start, min(number, start + self.batch_size)))
            if done is not None:
                done(len(examples))
        result = score(self.name, [e.verdict for e in examples], self.held_out, self.forms)
        measures = self.measure(examples) | _thinking(examples)
        return Outcome(result, examples, measures, tuple(self.held_out))


def _thinking(examples: Sequence[Example]) -> dict[str, float]:
    right = [e.thought_verdict.correct for e in examples if e.thought_verdict is not None]
    return {THOUGHT_RIGHT: sum(right) / len(right)} if right else {}
