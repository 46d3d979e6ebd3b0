"""A pipeline as the subject of SceneBench."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from neounify.evaluate.scenebench.run import MAX_ANSWER_TOKENS, MAX_STORY_TOKENS, Painting, Pixels
from neounify.pipeline import ImagePart, Pipeline
from neounify.pipeline.painting import paint, to_result
from neounify.pipeline.request import PaintRequest, make_sampling

MAX_THOUGHT_TOKENS = 128


class PipelineSubject:
    """Asks a pipeline in batches. `steps` and `guidance` None are the checkpoint's own."""

    def __init__(
        self, pipe: Pipeline, *, steps: int | None = None, guidance: float | None = None
    ) -> None:
        self._pipe = pipe
        self._options = {"steps": steps, "guidance": guidance}

    def answer(self, pictures: Sequence[Pixels], questions: Sequence[str]) -> list[str]:
        shown = [Image.fromarray(p) for p in pictures]
        found = self._pipe.chat_batch(list(questions), shown, max_new_tokens=MAX_ANSWER_TOKENS)
        return [result.text for result in found]

    def paint(
        self, prompts: Sequence[str], side: int, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        requests = [
            self._request(prompt, side, seed, think=think)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return self._painted(requests)

    def edit(
        self,
        pictures: Sequence[Pixels],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        think: bool,
    ) -> list[Painting]:
        requests = [
            self._request(text, picture.shape[0], seed, think=think, picture=picture)
            for picture, text, seed in zip(pictures, instructions, seeds, strict=True)
        ]
        return self._painted(requests)

    def tell(self, request: str, side: int, seed: int) -> list[Pixels]:
        parts = self._pipe.interleave(
            request,
            width=side,
            height=side,
            seed=seed,
            max_images=4,
            max_new_tokens=MAX_STORY_TOKENS,
            **self._options,  # type: ignore[arg-type]
        )
        return [_array(part.image) for part in parts if isinstance(part, ImagePart)]

    def _request(
        self, prompt: str, side: int, seed: int, *, think: bool, picture: Pixels | None = None
    ) -> PaintRequest:
        return PaintRequest(
            prompt=prompt,
            width=side,
            height=side,
            sampling=make_sampling(
                self._pipe.config,
                editing=picture is not None,
                **self._options,  # type: ignore[arg-type]
            ),
            images=() if picture is None else (Image.fromarray(picture),),
            seed=seed,
            think=think,
            max_think_tokens=MAX_THOUGHT_TOKENS,
        )

    def _painted(self, requests: Sequence[PaintRequest]) -> list[Painting]:
        result = to_result(paint(self._pipe.engine, requests), self._pipe.config.token_size)
        return [
            Painting(_array(image), thought)
            for image, thought in zip(result.images, result.thoughts, strict=True)
        ]


def _array(image: Image.Image) -> Pixels:
    return np.array(image)
