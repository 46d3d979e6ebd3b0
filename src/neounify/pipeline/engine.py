"""A loaded model with what belongs to it, and what the tasks do with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neounify.cache import Cache, SequenceCache
from neounify.checkpoint.residency import Residency
from neounify.decode import Generation, ModelInput, decode, forward_und
from neounify.engine.denoise import PaintJob, make_job
from neounify.engine.denoiser import Denoiser
from neounify.engine.grouping import groups
from neounify.engine.sequences import check_context
from neounify.errors import Cancelled, PromptError, not_finite
from neounify.flow.guidance import Branch
from neounify.flow.sampling import ResolvedSampling
from neounify.model.layout import Grid, Image, Span, Text
from neounify.model.neo import NeoUnify
from neounify.tasks.processor import Front
from neounify.text.special import IMAGE_CLOSE, IMAGE_OPEN
from neounify.text.template import ImageSegment, Prompt
from neounify.text.tokenizer import Tokenizer

MAX_PREFILL_ROWS = 32_768
"""Tokens per prefill call; a longer list of prompts is fed in several calls."""

ROOM = 64
"""Tokens a prefix cache has room for beyond its prompt; it grows when more are written."""


@dataclass
class Prefix:
    """A prompt the model has read.

    `hidden` [D] is the state of its last token, `context` the ids of its text.
    """

    cache: SequenceCache
    hidden: Tensor
    context: list[int]


class Engine(Front):
    """Model, tokenizer and weight residency. Holds no state of any request."""

    def __init__(
        self,
        model: NeoUnify,
        tokenizer: Tokenizer,
        residency: Residency,
        system_message: str,
    ) -> None:
        super().__init__(model.config, tokenizer, system_message, model.compute_dtype)
        self.model = model
        self.residency = residency

    def new_cache(self, capacity: int) -> SequenceCache:
        model = self.model
        return SequenceCache(model.config, capacity, dtype=model.compute_dtype, device=model.device)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Prompt], images: Sequence[Sequence[Tensor]]) -> list[Prefix]:
        """Prefill prompts of any lengths; `images` are each prompt's prepared pictures.

        Raises PromptError when one is longer than the model's context.
        """
        if not prompts:
            return []
        caches, inputs = zip(*map(self._first_input, prompts, images), strict=True)
        hidden: list[Tensor] = []
        with self.residency.use("und"):
            for group in groups(inputs, _rows, MAX_PREFILL_ROWS):
                states = forward_und(self.model, group)
                _check_finite(states)
                hidden += states.unbind()
        read = zip(caches, inputs, hidden, strict=True)
        return [Prefix(cache, state, list(f.ids)) for cache, f, state in read]

    @torch.inference_mode()
    def extend(self, cache: Cache, ids: Sequence[int], image: Tensor | None = None) -> Tensor:
        """Append text, or an image followed by text, to a prefix; the last state [D].

        Raises ContextFullError, having appended nothing, when the context has no room for it.
        """
        spans: tuple[Span, ...] = (Text(len(ids)),)
        if image is not None:
            spans = (Image.of(self.model.token_grid(image)), *spans)
        check_context(cache.document(*spans).end_t, self.config.max_positions)
        with self.residency.use("und"):
            images = () if image is None else (image,)
            return forward_und(self.model, [ModelInput(cache, spans, ids, images)])[0]

    @torch.inference_mode()
    def write(
        self,
        generations: Sequence[Generation],
        hidden: Tensor,
        cancel: threading.Event | None = None,
    ) -> Iterator[list[tuple[int, int]]]:
        """Write text; yields (number of the sequence, token) pairs step by step.

        `hidden` [B, D] are the last states. Sequences end at the model's context limit.
        """
        for generation in generations:
            room = self.config.max_positions - generation.cache.next_t
            generation.max_new_tokens = min(
                generation.max_new_tokens, len(generation.ids) + max(0, room)
            )
        with self.residency.use("und"):
            for taken in decode(self.model, generations, hidden):
                check_cancel(cancel)
                yield taken

    @torch.inference_mode()
    def paint(
        self, jobs: Sequence[PaintJob], cancel: threading.Event | None = None
    ) -> Iterator[int]:
        """Paint all jobs to their ends; yields the number of the step just taken, from 1."""
        step = 0
        denoiser = Denoiser(self.model)
        with self.residency.use("gen"):
            while running := [job for job in jobs if not job.done]:
                check_cancel(cancel)
                denoiser.step(running)
                step += 1
                yield step
        for job in jobs:
            _check_finite(job.z)

    def job(
        self,
        noise: Tensor,
        grid: Grid,
        prefixes: dict[Branch, SequenceCache],
        sampling: ResolvedSampling,
    ) -> PaintJob:
        """An image to be painted behind its prefixes, from scaled noise [tokens, 3·C²]."""
        return make_job(self.model, noise, grid, prefixes, sampling)

    def open_image(self, cache: SequenceCache) -> None:
        """Append `<img>`."""
        self.extend(cache, (self.token(IMAGE_OPEN),))

    def show_image(self, cache: SequenceCache, image: Tensor) -> Tensor:
        """Append a clean image and `</img>`; the last state [D]."""
        return self.extend(cache, (self.token(IMAGE_CLOSE),), image)

    def _first_input(
        self, prompt: Prompt, images: Sequence[Tensor]
    ) -> tuple[SequenceCache, ModelInput]:
        spans: list[Span] = []
        ids: list[int] = []
        used: list[Tensor] = []
        for segment in prompt.segments:
            if isinstance(segment, ImageSegment):
                used.append(images[segment.image])
                spans.append(Image.of(self.model.token_grid(used[-1])))
            elif segment.ids:
                spans.append(Text(len(segment.ids)))
                ids += segment.ids
        rows = sum(span.length for span in spans)
        cache = self.new_cache(rows + ROOM)
        length, limit = cache.document(*spans).end_t, self.config.max_positions
        if length > limit:
            raise PromptError(f"the prompt is {length} positions long, the model reads {limit}")
        return cache, ModelInput(cache, tuple(spans), ids, used)


def check_cancel(cancel: threading.Event | None) -> None:
    """Raise Cancelled if the caller asked to stop."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("the request was cancelled")


def _check_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise not_finite()


def _rows(item: ModelInput) -> int:
    return sum(span.length for span in item.spans)
