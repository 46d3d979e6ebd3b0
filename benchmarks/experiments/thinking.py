"""Images with and without a thought first: the same prompts and the same noise."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.bench import Bench, open_model, outcomes
from benchmarks.experiments.options import add_checkpoint_options, bench_of
from benchmarks.experiments.report import circumstances, table, write
from neounify.evaluate.intervals import Paired
from neounify.scenes.bench import Example, PipelineSubject, Rate, Subject
from neounify.scenes.world import scene_config

TITLE = "images with and without a thought first, on paired cases"
CATEGORIES = ("paint/position", "paint/attribution", "paint/two_object", "paint/counting")


@dataclass(frozen=True)
class Thought:
    """The cases of one category, each with and without a thought first."""

    category: str
    paired: Paired
    """First with, second without."""
    after_right: Paired | None
    """The same for the cases whose thought was right; None if there are none."""
    after_wrong: Paired | None

    @property
    def thoughts(self) -> Rate:
        """How many thoughts list a scene that fits the prompt."""
        return Rate(self.after_right.number if self.after_right else 0, self.paired.number)

    def to_json(self) -> dict[str, Any]:
        """All rates and differences as plain data."""
        split = {"after_right": self.after_right, "after_wrong": self.after_wrong}
        return {
            "category": self.category,
            **self.paired.to_json(),
            "thoughts": self.thoughts.to_json(),
            **{name: pairs.to_json() if pairs else None for name, pairs in split.items()},
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_options(parser)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure and write. Raises DataError, RequestError and the errors of `load`."""
    started, bench = time.monotonic(), bench_of(arguments)
    pipe, about = open_model(arguments.model)
    subject = PipelineSubject(pipe, steps=bench.steps, guidance=bench.guidance)
    compared = compare(subject, bench, token_size=pipe.config.token_size)
    report = {
        "experiment": "thinking",
        "first": "with a thought before",
        "second": "without",
        "settings": asdict(bench),
        "sampling": subject.sampling,
        "model": about,
        "categories": [item.to_json() for item in compared],
    }
    write(folder, report | circumstances(started), markdown(compared))


def compare(subject: Subject, bench: Bench, **fields: Any) -> list[Thought]:
    """Paint every category both ways; `fields` are of BenchConfig. The last item sums all up."""
    both = {
        think: outcomes(
            subject,
            bench.config(scene_config(bench.world), ("paint",), think=think, **fields),
            CATEGORIES,
            "with a thought" if think else "without",
        )
        for think in (True, False)
    }
    examples = {
        think: {c: by_category[c].examples for c in CATEGORIES}
        for think, by_category in both.items()
    }
    compared = [judge(c, examples[True][c], examples[False][c]) for c in CATEGORIES]
    return [*compared, judge("all four", _joined(examples[True]), _joined(examples[False]))]


def judge(category: str, thought: Sequence[Example], at_once: Sequence[Example]) -> Thought:
    """Compare the cases of a category, which both hold in the same order."""
    right = [e.thought_verdict is not None and e.thought_verdict.correct for e in thought]
    verdicts = [
        (a.verdict.correct, b.verdict.correct) for a, b in zip(thought, at_once, strict=True)
    ]

    def pairs(wanted: Sequence[bool]) -> Paired | None:
        chosen = [pair for pair, is_wanted in zip(verdicts, wanted, strict=True) if is_wanted]
        return Paired.of(*zip(*chosen, strict=True)) if chosen else None

    whole = Paired.of(*zip(*verdicts, strict=True))
    return Thought(category, whole, pairs(right), pairs([not r for r in right]))


def markdown(compared: Sequence[Thought]) -> str:
    """Two tables: with against without, and both again by whether the thought was right."""
    head = ["category", "n", "with a thought, % (95 %)", "without", "difference, points (95 %)"]
    head += ["right only with", "only without", "p"]
    rows = [
        [t.category, t.paired.number, t.paired.first, t.paired.second, *t.paired.cells()]
        for t in compared
    ]
    split_head = ["category", "correct thoughts, % (95 %)", "image correct after a correct thought"]
    split_head += ["the same cases without", "after a wrong thought", "the same cases without"]
    split = [
        [t.category, t.thoughts, *_both(t.after_right), *_both(t.after_wrong)] for t in compared
    ]
    return f"{table(head, rows)}\n{table(split_head, split)}"


def _both(pairs: Paired | None) -> tuple[object, object]:
    return (pairs.first, pairs.second) if pairs else ("", "")


def _joined(examples: Mapping[str, Sequence[Example]]) -> list[Example]:
    return [example for of_category in examples.values() for example in of_category]
