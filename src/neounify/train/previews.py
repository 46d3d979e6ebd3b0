"""Previews of a run: images and clips of fixed prompts, generated while a model trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from neounify.data.sample import DataError, Sample
from neounify.data.sources import FileSource, Mixture
from neounify.distributed.ranks import ONE, Ranks
from neounify.image.contact_sheet import contact_sheet, strip
from neounify.pipeline import Pipeline
from neounify.train.progress import Progress, Sampling
from neounify.train.recipe import Recipe
from neounify.train.setup import StageSources
from neounify.video.clip import Video
from neounify.video.library import has_video_library

MAX_IMAGES, MAX_CLIPS = 16, 4
"""Prompts of images and of clips, each of which has the tokens of many images."""
GRID_STEPS = 30
"""Sampling steps of an image or clip."""
FIRST_SAMPLES = 200
"""Samples of a stage that are searched for prompts."""


class Numbered(NamedTuple):
    """An image [h, w, 3], or clip with frames in front, of the prompt `number`."""

    number: int
    pixels: NDArray[np.uint8]
    fps: float = 0.0


class Prompts(NamedTuple):
    """Prompts of a stage's images, and of its clips."""

    images: Sequence[str]
    clips: Sequence[str]


class SampleGrid:
    """Generates the recipe's prompts, or those of its first samples, as samples/step-….png.

    A stage whose samples have clips to generate has a sheet of their frames, step-…-clips.png, and
    with the extra `video` the clips, step-…-1.mp4 and so on, in the checkpoint's default size and
    length. On many ranks, each generates its share of the prompts.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        sources: StageSources | None = None,
        ranks: Ranks = ONE,
    ) -> None:
        self.recipe, self.folder, self.ranks = recipe, folder / "samples", ranks
        self.sources = sources or StageSources(recipe)
        self._prompts: dict[int, Prompts] = {}

    def __call__(self, sampling: Sampling, progress: Progress) -> dict[str, float]:
        if progress.stage not in self._prompts:
            self._prompts[progress.stage] = self._prompts_of(progress.stage)
        prompts = self._prompts[progress.stage]
        if not any(prompts):
            return {}

        def generate() -> tuple[list[Numbered], list[Numbered]]:
            with sampling() as pipe:
                return self._images(pipe, prompts.images), self._clips(pipe, prompts.clips)

        parts = self.ranks.gather(self.ranks.together(generate))
        images, clips = (_in_order(of_ranks) for of_ranks in zip(*parts, strict=True))
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save(self.folder / f"step-{progress.step:08d}", prompts, images, clips)
        return {}

    def _share(self, prompts: Sequence[str]) -> dict[int, str]:
        """The prompts of this rank by their numbers, which are their seeds."""
        return {n: prompts[n] for n in range(self.ranks.rank, len(prompts), self.ranks.size)}

    def _images(self, pipe: Pipeline, prompts: Sequence[str]) -> list[Numbered]:
        share = self._share(prompts)
        if not share:
            return []
        images = pipe.generate([*share.values()], seed=[*share], steps=GRID_STEPS).images
        return [Numbered(n, np.asarray(x)) for n, x in zip(share, images, strict=True)]

    def _clips(self, pipe: Pipeline, prompts: Sequence[str]) -> list[Numbered]:
        share, frames = self._share(prompts), pipe.config.sampling.video.frames
        if not share:
            return []
        result = pipe.generate([*share.values()], seed=[*share], frames=frames, steps=GRID_STEPS)
        return [
            Numbered(n, video.frames.numpy(), float(video.fps))
            for n, video in zip(share, result.videos, strict=True)
        ]

    def _save(
        self, stem: Path, prompts: Prompts, images: Sequence[Numbered], clips: Sequence[Numbered]
    ) -> None:
        """Write the sheets, and the clips as files."""
        if images:
            shown = [image.pixels for image in images]
            sheet = contact_sheet(shown, prompts.images, [True] * len(shown), columns=8)
            sheet.save(f"{stem}.png")
        if clips:
            shown = [strip(clip.pixels) for clip in clips]
            sheet = contact_sheet(shown, prompts.clips, [True] * len(shown), columns=1)
            sheet.save(f"{stem}-clips.png")
        for clip in clips if has_video_library() else ():
            video = Video(torch.from_numpy(clip.pixels), Fraction(clip.fps))
            video.save(f"{stem}-{clip.number + 1}.mp4")

    def _prompts_of(self, number: int) -> Prompts:
        """Prompts of the recipe, or user texts of the first samples of a stage's data.

        The recipe's are those of clips where samples have clips to generate, and of images where
        they have none, or images too.
        """
        stage = self.recipe.stages[number]
        drawn = {task for data in stage.data for task in data.tasks_drawn()}
        texts: dict[str, list[str]] = defaultdict(list)
        if "t2v" in drawn or (stage.data and not self.recipe.prompts):
            for sample in _first_samples(self.sources.of(stage)):
                texts[sample.task].append(sample.text("user"))
        images, clips = texts["t2i"][:MAX_IMAGES], texts["t2v"][:MAX_CLIPS]
        if self.recipe.prompts:
            images = [] if clips and not images else list(self.recipe.prompts)
            clips = list(self.recipe.prompts[:MAX_CLIPS]) if clips else []
        return Prompts(images, clips)


def _in_order(of_ranks: Iterable[list[Numbered]]) -> list[Numbered]:
    return sorted(chain(*of_ranks), key=itemgetter(0))


def _first_samples(source: Mixture) -> list[Sample]:
    """Samples of a mixture, without their images where they are in files."""
    samples: list[Sample] = []
    for index in range(FIRST_SAMPLES):
        which, number = source.describe(index)
        content = source.sources[which]
        with suppress(DataError):  # the loader counts damaged samples
            if isinstance(content, FileSource):
                samples.append(content.unread(number).sample)
            else:
                samples.append(content[number])
    return samples
