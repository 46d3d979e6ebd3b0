"""Models and judges of the tests of public benchmarks, on made scenes with known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image

from neounify.bench.cases import Record
from neounify.bench.subjects import Image, Job
from neounify.post_train.prompts import PromptCase
from neounify.scenes.bench import CATEGORIES, PaintCase, check_image, paint_cases
from neounify.scenes.world import scene_config
from neounify.scenes.world.render import render

WORLD = scene_config("default")
CASES = [case for category in CATEGORIES[:2] for case in paint_cases(category, WORLD, 6, seed=3)]
"""Cases of SceneBench, whose facts a program can check."""


def scene_judge(outputs: Sequence[Any], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """The checker of SceneBench as a hook; a record names its case by `number`."""
    return [
        {"correct": float(check_image(CASES[case.record["number"]].facts, output, WORLD).correct)}
        for output, case in zip(outputs, cases, strict=True)
    ]


def scene_of(case: PaintCase) -> Image:
    """A render that is right for a case."""
    return PIL.Image.fromarray(render(case.scene, WORLD))


class Painter:
    """A model whose images `paint` makes of a job; it counts what it is asked."""

    def __init__(self, paint: Callable[[Job], Image] | None = None) -> None:
        self.paint = paint or (lambda job: solid(job.seed))
        self.jobs: list[Job] = []

    def describe(self) -> Record:
        return {"model": {"name": "painter"}}

    def images(self, jobs: Sequence[Job]) -> list[Image]:
        self.jobs += jobs
        return [self.paint(job) for job in jobs]

    def answers(self, jobs: Sequence[Job]) -> list[str]:
        self.jobs += jobs
        return [f"The answer is {job.prompt[-1]}" for job in jobs]

    def stories(self, jobs: Sequence[Job]) -> list[list[str | Image]]:
        self.jobs += jobs
        return [["First", self.paint(job), "then", self.paint(job), "end"] for job in jobs]


def solid(seed: int, side: int = 8) -> Image:
    """An image of one colour, which depends on its seed alone."""
    return PIL.Image.new("RGB", (side, side), (seed % 251, seed // 251 % 251, 7))
