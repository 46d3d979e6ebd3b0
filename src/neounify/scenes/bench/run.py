"""Runs of SceneBench on a model: ask, generate, judge, count.

Case k of a category always has the same prompt and the same noise, whatever the batch size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import neounify
from neounify.pipeline import Pipeline
from neounify.runtime.process import processor_name
from neounify.scenes.bench.category import Example, Outcome, Pixels
from neounify.scenes.bench.plan import TASKS, BenchConfig
from neounify.scenes.bench.report import Report
from neounify.scenes.bench.runners import names, plan
from neounify.scenes.bench.subject import (
    Painting,
    PipelineSubject,
    Subject,
    as_subject,
)
from neounify.scenes.world.scene import SceneConfig, scene_config

__all__ = [
    "TASKS",
    "BenchConfig",
    "Example",
    "Findings",
    "Outcome",
    "Painting",
    "Pixels",
    "ProgressFn",
    "Subject",
    "measure",
    "names",
    "quick_scores",
    "run_scenebench",
    "surroundings",
    "to_report",
]

ProgressFn = Callable[[str, int, int], None]
"""Progress: category, cases done, cases in all."""


@dataclass(frozen=True)
class Findings:
    """A report, and the outcomes behind it with every image and answer."""

    report: Report
    outcomes: tuple[Outcome, ...]


def run_scenebench(
    subject: Subject, config: BenchConfig, progress: ProgressFn | None = None
) -> Iterator[Outcome]:
    """Measure category by category, so that what is done is kept when the rest is not."""
    for category in plan(subject, config):
        name, total = category.name, len(category.held_out)

        def tell(done: int, name: str = name, total: int = total) -> None:
            if progress is not None:
                progress(name, done, total)

        yield category.run(tell)


def measure(
    pipeline: Pipeline | Subject,
    *,
    world: str | SceneConfig = "default",
    tasks: Sequence[str] = TASKS,
    cases_per_category: int = 200,
    seed: int = 0,
    batch_size: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    think: bool = False,
    progress: ProgressFn | None = None,
) -> Findings:
    """Run SceneBench and sum it up.

    Args:
        pipeline: the model, or another `Subject` (which samples as it likes: `steps` and
            `guidance` are the pipeline's, None its checkpoint's own).
        world: a preset's name or a config; its side must be a multiple of the model's token side.
        tasks: some of `TASKS`, and "wording" and "sizes".
        cases_per_category: at least 1.
        seed: of cases and noise, 0 to 2³² − 1.
        batch_size: cases asked at once; it changes nothing but speed and memory.
        think: paint and edit with a thought before.
        progress: called with (category, cases done, total) after every batch.

    Raises DataError for what cannot be measured, RequestError for sampling out of range.
    """
    config = BenchConfig(
        world=scene_config(world) if isinstance(world, str) else world,
        tasks=tuple(tasks),
        cases=cases_per_category,
        seed=seed,
        batch_size=batch_size,
        think=think,
        **_token_size(pipeline),
    )
    subject = as_subject(pipeline, steps=steps, guidance=guidance)
    started = time.monotonic()
    outcomes = tuple(run_scenebench(subject, config, progress))
    settings = {
        "world": world if isinstance(world, str) else "custom",
        "tasks": list(config.tasks),
        "cases": config.cases,
        "seed": seed,
        "batch_size": batch_size,
        "think": think,
        "sampling": subject.sampling if isinstance(subject, PipelineSubject) else None,
        "model": {"fingerprint": getattr(pipeline, "fingerprint", None)},
    }
    return Findings(to_report(outcomes, settings | surroundings(started)), outcomes)


def quick_scores(
    pipeline: Pipeline | Subject,
    world: str | SceneConfig = "default",
    cases: int = 16,
    seed: int = 1,
    *,
    tasks: Sequence[str] = ("paint", "vqa", "caption", "edit"),
    steps: int | None = None,
) -> dict[str, float]:
    """Strict rates (0 to 1) of a few cases per category, as "bench/NAME", for a look in training.

    Raises as `measure` does.
    """
    findings = measure(
        pipeline, world=world, tasks=tasks, cases_per_category=cases, seed=seed, steps=steps
    )
    return {f"bench/{score.category}": score.strict.value for score in findings.report.scores}


def to_report(outcomes: Sequence[Outcome], about: dict[str, Any]) -> Report:
    """The scores and measures of what was measured."""
    measures = {o.score.category: o.measures for o in outcomes if o.measures}
    return Report(tuple(outcome.score for outcome in outcomes), about, measures)


def surroundings(started: float) -> dict[str, Any]:
    """Seconds, processor, threads and versions of a run, for its report.

    `started` is a time of `time.monotonic`.
    """
    return {
        "seconds": round(time.monotonic() - started, 1),
        "processor": processor_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "neounify": neounify.__version__,
    }


def _token_size(pipeline: Pipeline | Subject) -> dict[str, int]:
    """The pipeline's token side; the default for subjects without tokens."""
    return {"token_size": pipeline.config.token_size} if isinstance(pipeline, Pipeline) else {}
