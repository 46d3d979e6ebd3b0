"""Subjects of a benchmark: the protocol, and a pipeline as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from neounify.flow.sampling import ImageSampling
from neounify.pipeline import ImagePart, Pipeline
from neounify.scenes.bench.category import Pixels
from neounify.tasks.image import ImageRequest

MAX_ANSWER_TOKENS = 96
MAX_STORY_TOKENS = 400
MAX_STORY_IMAGES = 4
"""One more than the longest story has, so that too many show."""
MAX_THOUGHT_TOKENS = 128


Side = int | tuple[int, int]
"""Pixels of a square image's side, or the width and height of another."""


@dataclass(frozen=True)
class Painting:
    """A painted image and the thought before it, if one was asked for."""

    image: Pixels
    thought: str | None = None


class Subject(Protocol):
    """A model under test, or a stand-in that answers questions and generates images.

    Every call but `tell` takes several cases and gives back one result for each, in order.
    Images are uint8 [height, width, 3]; `seeds` fix the noise of each painted image.
    """

    def answer(self, images: Sequence[Pixels | None], questions: Sequence[str]) -> list[str]:
        """Answer one question about each image; None: the question comes without one."""

    def paint(
        self, prompts: Sequence[str], side: Side, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        """Paint each prompt, `side` pixels wide and high, or (width, height)."""

    def edit(
        self,
        images: Sequence[Pixels],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        think: bool,
    ) -> list[Painting]:
        """Paint each image again as its instruction says, in its own size."""

    def tell(self, request: str, side: int, seed: int) -> list[Pixels]:
        """The images of an answer in text and images, any number of them."""


class PipelineSubject:
    """Asks a pipeline in batches.

    `steps` and `guidance` None are the checkpoint's own; RequestError if they are out of range.
    Texts are the likeliest ones, so that nothing but the seeds is drawn.
    """

    def __init__(
        self, pipe: Pipeline, *, steps: int | None = None, guidance: float | None = None
    ) -> None:
        self._pipe, self._steps, self._guidance = pipe, steps, guidance
        self._sampling = {
            editing: ImageSampling(steps=steps, guidance=guidance).resolve(
                pipe.config, editing=editing
            )
            for editing in (False, True)
        }

    @property
    def sampling(self) -> dict[str, float]:
        """Sampling settings of images, with the checkpoint's values where none are set."""
        sampling = self._sampling[True]
        return {
            "steps": sampling.steps,
            "guidance": sampling.guidance.text,
            "image_guidance": sampling.guidance.image,
            "shift": sampling.shift,
        }

    def answer(self, images: Sequence[Pixels | None], questions: Sequence[str]) -> list[str]:
        shown = [() if image is None else (Image.fromarray(image),) for image in images]
        answers = self._pipe.chat_batch(list(questions), shown, max_new_tokens=MAX_ANSWER_TOKENS)
        return [result.text for result in answers]

    def paint(
        self, prompts: Sequence[str], side: Side, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        size = (side, side) if isinstance(side, int) else side
        requests = [
            self._request(prompt, size, seed, think=think)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return self._painted(requests)

    def edit(
        self,
        images: Sequence[Pixels],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        think: bool,
    ) -> list[Painting]:
        requests = [
            self._request(text, (image.shape[1], image.shape[0]), seed, think=think, image=image)
            for image, text, seed in zip(images, instructions, seeds, strict=True)
        ]
        return self._painted(requests)

    def tell(self, request: str, side: int, seed: int) -> list[Pixels]:
        parts = self._pipe.interleave(
            request,
            width=side,
            height=side,
            seed=seed,
            max_images=MAX_STORY_IMAGES,
            max_new_tokens=MAX_STORY_TOKENS,
            steps=self._steps,
            guidance=self._guidance,
        )
        return [np.array(part.image) for part in parts if isinstance(part, ImagePart)]

    def _request(
        self,
        prompt: str,
        size: tuple[int, int],
        seed: int,
        *,
        think: bool,
        image: Pixels | None = None,
    ) -> ImageRequest:
        return ImageRequest(
            prompt=prompt,
            width=size[0],
            height=size[1],
            sampling=self._sampling[image is not None],
            images=() if image is None else (Image.fromarray(image),),
            seed=seed,
            think=think,
            max_think_tokens=MAX_THOUGHT_TOKENS,
        )

    def _painted(self, requests: Sequence[ImageRequest]) -> list[Painting]:
        result = self._pipe.generate_requests(requests)
        return [
            Painting(np.array(image), thought)
            for image, thought in zip(result.images, result.thoughts, strict=True)
        ]


def as_subject(
    asked: Pipeline | Subject, *, steps: int | None = None, guidance: float | None = None
) -> Subject:
    """A pipeline as a subject; any other subject as it is, which has its own sampling."""
    if isinstance(asked, Pipeline):
        return PipelineSubject(asked, steps=steps, guidance=guidance)
    return asked
