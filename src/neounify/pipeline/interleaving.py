"""One answer of text and images by turns: write until an image opens, paint it, go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.cache import SequenceCache
from neounify.config import ModelConfig, TextSampling
from neounify.config.sampling import check_seed
from neounify.decode.loop import Generation
from neounify.decode.sampling import SamplingState
from neounify.engine.denoise import PaintJob, to_pixels
from neounify.errors import ContextFullError, RequestError
from neounify.flow.guidance import Branch
from neounify.flow.noise import initial_noise
from neounify.flow.sampling import ResolvedSampling
from neounify.image.pixels import normalise_und, patchify
from neounify.model.layout import Grid
from neounify.pipeline.engine import Engine
from neounify.pipeline.painting import edit_images
from neounify.pipeline.results import (
    ImagePart,
    InterleavePart,
    PaintProgress,
    PreviewPart,
    TextPart,
)
from neounify.tasks.processor import Front
from neounify.tasks.requests import check_negative_prompt, image_noise_scale
from neounify.text.message import Message
from neounify.text.special import IM_END, IMAGE_OPEN
from neounify.text.template import (
    Prompt,
    images_only_prompt,
    interleave_prompt,
    place_images,
    unconditional_prompt,
)
from neounify.text.tokenizer import TextStream

MAX_IMAGES = 100


@dataclass(frozen=True, kw_only=True)
class InterleaveRequest:
    """`sizes` are the (width, height) of the images in turn; the last one is kept.

    `max_new_tokens` counts text over the whole answer. `history` are earlier turns, whose
    images come first in `images`. `negative_prompt` is as in a PaintRequest.
    """

    prompt: str
    sizes: Sequence[tuple[int, int]]
    sampling: ResolvedSampling
    images: Sequence[PIL.Image.Image] = ()
    max_images: int = 10
    max_new_tokens: int = 2048
    seed: int = 0
    think: bool = False
    system: str = ""
    text: TextSampling = field(default_factory=TextSampling)
    history: Sequence[Message] = ()
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0 <= self.max_images <= MAX_IMAGES:
            raise RequestError(
                f"max_images must be from 0 to {MAX_IMAGES}, got {self.max_images}",
                param="max_images",
            )
        if self.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}",
                param="max_new_tokens",
            )
        check_negative_prompt(self.negative_prompt, self.sampling)

    @property
    def own_images(self) -> int:
        """How many of `images` belong to the prompt, not to the history."""
        return len(self.images) - sum(message.n_images for message in self.history)


def interleave(
    engine: Engine, request: InterleaveRequest, cancel: threading.Event | None = None
) -> Iterator[InterleavePart]:
    """Text pieces as they come, a preview per denoising step, each finished image.

    Ends where the model's context ends, as text does.
    """
    return _Interleaving(engine, request, cancel).parts()


def turn_prompt(front: Front, request: InterleaveRequest, branch: Branch) -> Prompt:
    """What the model reads before its answer, for one branch of guidance."""
    tokenizer, negative = front.tokenizer, request.negative_prompt
    if branch == "uncond":
        return unconditional_prompt(tokenizer, negative)
    if branch == "image":
        # One turn with all images, those of earlier answers too: it never holds any text.
        count = len(request.images)
        return images_only_prompt(tokenizer, count, open_image=False, negative=negative)
    text = place_images(request.prompt, request.own_images, numbered=True)
    return interleave_prompt(
        tokenizer, text, system=request.system, think=request.think, history=request.history
    )


def draw_noise(
    config: ModelConfig, width: int, height: int, generator: torch.Generator
) -> Float[Tensor, "n ccc"]:
    """The next image's scaled noise as tokens: one draw of a call's generator."""
    scale = image_noise_scale(Grid.of_pixels(height, width, config.token_size), config)
    noise = initial_noise((1, config.channels, height, width), scale, generator)
    return patchify(noise, config.token_size, config.channels)[0]


def seen_again(pixels: Float[Tensor, "3 h w"], dtype: torch.dtype) -> Float[Tensor, "3 h w"]:
    """A painted image as the understanding stream takes it, not clamped."""
    return normalise_und((pixels + 1) / 2).to(dtype)


class _Interleaving:
    """One answer under way: a prefix per guidance branch, one noise generator, one text."""

    def __init__(
        self, engine: Engine, request: InterleaveRequest, cancel: threading.Event | None
    ) -> None:
        self.engine, self.request, self.cancel = engine, request, cancel
        self.noise = torch.Generator().manual_seed(request.seed)
        inputs = edit_images(engine, request.images)
        branches = request.sampling.guidance.branches()
        read = engine.read(
            [turn_prompt(engine, request, branch) for branch in branches],
            [[] if branch == "uncond" else inputs for branch in branches],
        )
        self.prefixes: dict[Branch, SequenceCache] = {
            branch: prefix.cache for branch, prefix in zip(branches, read, strict=True)
        }
        cond = read[branches.index("cond")]
        self.hidden = cond.hidden
        stops = frozenset((engine.token(IM_END), engine.token(IMAGE_OPEN)))
        self.text = Generation(
            cond.cache, SamplingState(request.text, cond.context), stops, request.max_new_tokens
        )

    def parts(self) -> Iterator[InterleavePart]:
        painted = 0
        while True:
            yield from self._write()
            if self.text.stopped_by != self.engine.token(IMAGE_OPEN):
                return
            if painted == self.request.max_images:
                return
            sizes = self.request.sizes
            try:
                yield from self._paint(*sizes[min(painted, len(sizes) - 1)])
            except ContextFullError:
                return
            painted += 1

    def _write(self) -> Iterator[TextPart]:
        stream: TextStream = self.engine.tokenizer.stream()
        self.text.resume()
        for taken in self.engine.write([self.text], self.hidden[None], self.cancel):
            for _, token in taken:
                if piece := stream.put(token):
                    yield TextPart(piece)
        if piece := stream.flush():
            yield TextPart(piece)

    def _paint(self, width: int, height: int) -> Iterator[PreviewPart | ImagePart]:
        engine = self.engine
        seeing = {b: cache for b, cache in self.prefixes.items() if b != "uncond"}
        for cache in seeing.values():
            engine.open_image(cache)
        job = self._job(width, height)
        side = engine.config.token_size
        for step in engine.paint([job], self.cancel):
            clean = to_pixels([job.clean], job.grid, side)
            yield PreviewPart(PaintProgress(step, job.steps, clean))
        pixels = to_pixels([job.z], job.grid, side)[0]
        yield ImagePart(pixels)
        clean_copy = seen_again(pixels, engine.dtype)
        states = {b: engine.show_image(cache, clean_copy) for b, cache in seeing.items()}
        self.hidden = states["cond"]

    def _job(self, width: int, height: int) -> PaintJob:
        config = self.engine.config
        grid = Grid.of_pixels(height, width, config.token_size)
        noise = draw_noise(config, width, height, self.noise)
        return self.engine.job(noise, grid, self.prefixes, self.request.sampling)
