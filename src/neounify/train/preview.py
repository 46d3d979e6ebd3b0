"""A look at a model in training: the same prompts painted every time, as one picture."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from neounify.data.sample import DataError, Sample
from neounify.pipeline import Pipeline
from neounify.scenes.bench.report import contact_sheet
from neounify.train.progress import Progress
from neounify.train.recipe import Recipe
from neounify.train.setup import StageSources

PICTURES = 16
STEPS = 30


class Painter:
    """Paints the recipe's prompts, or those of its first samples, into samples/step-….png."""

    def __init__(self, recipe: Recipe, folder: Path, sources: StageSources | None = None) -> None:
        self.recipe, self.folder = recipe, folder / "samples"
        self.sources = sources or StageSources(recipe)

    def __call__(self, pipe: Pipeline, progress: Progress) -> dict[str, float]:
        prompts = list(self.recipe.prompts) or self._prompts(progress.stage)
        if not prompts:
            return {}
        painted = pipe.generate(prompts, seed=list(range(len(prompts))), steps=STEPS)
        pictures = [np.asarray(image) for image in painted.images]
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(pictures, prompts, [True] * len(prompts), columns=8)
        sheet.save(self.folder / f"step-{progress.step:08d}.png")
        return {}

    def _prompts(self, stage: int) -> list[str]:
        """User texts of the first painting samples of the stage's data."""
        source = self.sources.of(self.recipe.stages[stage])
        samples: list[Sample] = []
        for index in range(200):
            with suppress(DataError):  # the loader counts damaged samples
                samples.append(source[index])
        wanted = [sample.text("user") for sample in samples if sample.task == "t2i"]
        return wanted[:PICTURES]
