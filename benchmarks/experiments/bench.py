"""SceneBench in pieces: chosen categories only, and the model that is asked."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import neounify
from neounify.bundled import bundled_model
from neounify.data.sample import DataError
from neounify.pipeline import Pipeline
from neounify.scenes.bench import BenchConfig, Outcome, Subject, names
from neounify.scenes.bench.runners import plan
from neounify.scenes.world.scene import SceneConfig


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How SceneBench asks in an experiment.

    `cases` per category; `steps` and `guidance` None are the checkpoint's own; `seed` is of cases
    and noise.
    """

    world: str
    cases: int = 200
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch_size: int = 64

    def config(self, world: SceneConfig, tasks: tuple[str, ...], **fields: Any) -> BenchConfig:
        """The run of SceneBench that asks so. Raises DataError."""
        return BenchConfig(
            world=world,
            tasks=tasks,
            cases=self.cases,
            seed=self.seed,
            batch_size=self.batch_size,
            **fields,
        )


def outcomes(
    subject: Subject, config: BenchConfig, wanted: Collection[str], label: str = ""
) -> dict[str, Outcome]:
    """Measure the wanted categories of a run, by name. Raises DataError if it lacks one."""
    missing = set(wanted) - set(names(config))
    if missing:
        raise DataError(f"this world has no category {', '.join(sorted(missing))}")
    by_category = {}
    for category in plan(subject, config):
        if category.name in wanted:
            by_category[category.name] = category.run()
            strict = by_category[category.name].score.strict
            print(f"{label} {category.name} {strict}".strip(), file=sys.stderr)
    return by_category


def open_model(folder: Path | None) -> tuple[Pipeline, dict[str, str | None]]:
    """A checkpoint in float32, the bundled one for None, and what a report says of it."""
    pipe = neounify.load(folder or bundled_model(), dtype="float32")
    name = "bundled" if folder is None else folder.name
    return pipe, {"name": name, "fingerprint": pipe.fingerprint}
