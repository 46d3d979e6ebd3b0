"""A service without a model: it answers by a script, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace

import torch
from PIL import Image

from neounify.config import ModelConfig
from neounify.config.presets import TINY
from neounify.serve.service import ServiceRequest
from neounify.tasks.chat import ChatRequest, CompletionRequest
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from neounify.tasks.program import (
    Finished,
    ImageFinished,
    Preview,
    Processor,
    PromptPrefilled,
    TaskEvent,
    TextPiece,
)
from neounify.text import byte_tokenizer
from neounify.text.forms import TEMPLATES
from support.patches import to_gen_pixels

Script = Callable[[ServiceRequest, int], Iterable[TaskEvent | float | Exception]]
"""(request, previews) -> events to give, seconds to wait, an error to end with."""


def colour_of(seed: int) -> tuple[int, int, int]:
    """What an image of that seed is filled with."""
    return (seed * 40 % 256, seed * 90 % 256, seed * 130 % 256)


def plain(request: ServiceRequest, previews: int) -> list[TaskEvent | float | Exception]:
    """Text that repeats the question, images in the colour of their seed."""
    if isinstance(request, ChatRequest):
        thought = [TextPiece("Hm, ", thought=True), TextPiece("yes.", thought=True)]
        words = [TextPiece("You said: "), TextPiece(request.messages[-1].text)]
        return [*(thought if request.think else []), *words, Finished("stop", 11, 5, 3)]
    if isinstance(request, CompletionRequest):
        return [PromptPrefilled(), TextPiece(" and so on"), Finished("stop", 4, 3)]
    if isinstance(request, ImageRequest):
        return _images(request, previews)
    return _story(request, previews)


def _images(request: ImageRequest, previews: int) -> list[TaskEvent | float | Exception]:
    shown = 12 * len(request.images)
    usage = Finished("stop", 20 + shown, 0, 3, 16, prompt_image_tokens=shown)
    events: list[TaskEvent | float | Exception] = []
    if request.think:
        events.append(TextPiece("A plan.", thought=True))
    for index, seed in enumerate(request.seeds or [request.seed]):
        image = _image(request.width, request.height, seed)
        events += _painting(image, index, previews, usage)
    return [*events, replace(usage, image_tokens=16 * request.count)]


def _story(request: InterleaveRequest, previews: int) -> list[TaskEvent | float | Exception]:
    image, usage = _image(*request.sizes[-1], request.seed), Finished("stop", 20, 9, 0, 32)
    return [
        TextPiece("Once "),
        TextPiece("upon a time"),
        *_painting(image, 0, previews, usage),
        TextPiece(" and then"),
        *_painting(image, 1, previews, usage),
        usage,
    ]


def _image(width: int, height: int, seed: int) -> torch.Tensor:
    return to_gen_pixels(Image.new("RGB", (width, height), colour_of(seed)))


def _painting(image: torch.Tensor, index: int, previews: int, usage: Finished) -> list[TaskEvent]:
    steps = [Preview(index, step + 1, 8, image / 2) for step in range(previews)]
    return [*steps, ImageFinished(index, image, usage, 16.0)]


class Scripted:
    """A `Service` for tests."""

    def __init__(self, script: Script = plain, config: ModelConfig = TINY) -> None:
        self._script, self._config = script, config
        self.requests: list[ServiceRequest] = []
        self.deadlines: list[float | None] = []
        self.open = 0
        self.most_open = 0

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def last(self) -> ServiceRequest:
        """The request that came last."""
        return self.requests[-1]

    @property
    def processor(self) -> Processor:
        tokens = TEMPLATES[self._config.template].tokens
        return Processor(self._config, byte_tokenizer(required=tokens), None, torch.float32)

    def check_together(self, requests: Sequence[ServiceRequest]) -> None:
        """Any number."""

    async def answer(
        self,
        request: ServiceRequest,
        *,
        previews: int = 0,
        deadline: float | None = None,
        admitted: Callable[[], None] | None = None,
    ) -> AsyncIterator[TaskEvent]:
        self.requests.append(request)
        self.deadlines.append(deadline)
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            for item in self._script(request, previews):
                if isinstance(item, Exception):
                    raise item
                if admitted is not None:
                    admitted()
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield item
        finally:
            self.open -= 1
