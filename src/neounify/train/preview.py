"""Periodic sample grid from fixed prompts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from neounify.data.sample import DataError, Sample
from neounify.image.contact_sheet import contact_sheet
from neounify.pipeline import Pipeline
from neounify.train.progress import Progress
from neounify.train.recipe import Recipe
from neounify.train.setup import StageSources

MAX_PROMPTS = 16
STEPS = 30


class SampleGrid:
    """Generates the recipe's prompts, or those of its first samples, as samples/step-….png."""

    def __init__(self, recipe: Recipe, folder: Path, sources: StageSources | None = None) -> None:
        self.recipe, self.folder = recipe, folder / "samples"
        self.sources = sources or StageSources(recipe)

    def __call__(self, pipe: Pipeline, progress: Progress) -> dict[str, float]:
        prompts = list(self.recipe.prompts) or self._prompts(progress.stage)
        if not prompts:
            return {}
        generated = pipe.generate(prompts, seed=list(range(len(prompts))), steps=STEPS)
        images = [np.asarray(image) for image in generated.images]
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(images, prompts, [True] * len(prompts), columns=8)
        sheet.save(self.folder / f"step-{progress.step:08d}.png")
        return {}

    def _prompts(self, stage: int) -> list[str]:
        """User texts of the first text-to-image samples of the stage's data."""
        source = self.sources.of(self.recipe.stages[stage])
        samples: list[Sample] = []
        for index in range(200):
            with suppress(DataError):  # the loader counts damaged samples
                samples.append(source[index])
        prompts = [sample.text("user") for sample in samples if sample.task == "t2i"]
        return prompts[:MAX_PROMPTS]
