"""Text to image and editing: prefixes for every request, then one shared denoising."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor

from neounify.cache import SequenceCache
from neounify.config import TextSampling
from neounify.decode.loop import Generation
from neounify.decode.sampling import SamplingState
from neounify.engine.denoise import PaintJob, to_pixels
from neounify.flow.guidance import Branch
from neounify.pipeline.engine import Engine, Prefix
from neounify.pipeline.results import PaintProgress, PaintResult
from neounify.tasks.processor import Front
from neounify.tasks.requests import PaintRequest
from neounify.text.special import IM_END, THINK_CLOSE
from neounify.text.template import (
    Prompt,
    after_think_ids,
    images_only_prompt,
    paint_prompt,
    place_images,
    unconditional_prompt,
)

Callback = Callable[[PaintProgress], None]


@dataclass
class Painted:
    """The jobs of one request, done, and the thought before them."""

    request: PaintRequest
    jobs: list[PaintJob]
    thought: str | None

    def pixels(self, token_size: int) -> Tensor:
        """[count, 3, H, W]."""
        return to_pixels([job.z for job in self.jobs], self.jobs[0].grid, token_size)


def paint(
    engine: Engine,
    requests: Sequence[PaintRequest],
    *,
    callback: Callback | None = None,
    cancel: threading.Event | None = None,
) -> list[Painted]:
    """Paint all requests together, whatever their prompts.

    `callback` is told after each step; it needs images of one size.
    """
    prefixes = _prefixes(engine, requests)
    thoughts = think(engine, requests, [p["cond"] for p in prefixes], cancel)
    painted = [
        Painted(request, _jobs(engine, request, {b: p.cache for b, p in own.items()}), thought)
        for request, own, thought in zip(requests, prefixes, thoughts, strict=True)
    ]
    jobs = [job for item in painted for job in item.jobs]
    for step in engine.paint(jobs, cancel):
        if callback is not None:
            pixels = to_pixels([job.clean for job in jobs], jobs[0].grid, engine.config.token_size)
            callback(PaintProgress(step, max(job.steps for job in jobs), pixels))
    return painted


def to_result(painted: Sequence[Painted], token_size: int) -> PaintResult:
    """The images of all requests, which are of one size, as the caller gets them."""
    return PaintResult(
        pixels=torch.cat([item.pixels(token_size) for item in painted]),
        thoughts=[item.thought for item in painted],
        seeds=[item.request.seed if item.request.noise is None else None for item in painted],
    )


def edit_images(front: Front, images: Sequence[PIL.Image.Image]) -> list[Tensor]:
    """Input pictures of editing and interleaving, sized and normalised."""
    return front.prepare(images, *front.config.sampling.edit_bounds(len(images)))


def branch_prompt(front: Front, request: PaintRequest, branch: Branch) -> Prompt:
    """What the model reads before it paints, for one branch of guidance."""
    tokenizer, count = front.tokenizer, len(request.images)
    negative = request.negative_prompt
    if branch == "uncond":
        return unconditional_prompt(tokenizer, negative)
    if branch == "image":
        return images_only_prompt(tokenizer, count, open_image=True, negative=negative)
    system = front.system_message if request.system is None else request.system
    text = place_images(request.prompt, count, numbered=True)
    return paint_prompt(tokenizer, text, system=system, think=request.think)


def _prefixes(engine: Engine, requests: Sequence[PaintRequest]) -> list[dict[Branch, Prefix]]:
    """Read the prefixes each request needs; equal negative prompts share one."""
    places: list[dict[Branch, int]] = [{} for _ in requests]
    shared: dict[str, int] = {}
    prompts: list[Prompt] = []
    images: list[list[Tensor]] = []
    for request, own in zip(requests, places, strict=True):
        inputs = edit_images(engine, request.images)
        for branch in request.sampling.guidance.branches():
            if branch == "uncond" and request.negative_prompt in shared:
                own[branch] = shared[request.negative_prompt]
                continue
            own[branch] = len(prompts)
            if branch == "uncond":
                shared[request.negative_prompt] = len(prompts)
            prompts.append(branch_prompt(engine, request, branch))
            images.append([] if branch == "uncond" else inputs)
    read = engine.read(prompts, images)
    return [{branch: read[place] for branch, place in own.items()} for own in places]


def think(
    engine: Engine,
    requests: Sequence[PaintRequest],
    prefixes: Sequence[Prefix],
    cancel: threading.Event | None,
) -> list[str | None]:
    """Let the requests that ask for it think; their prefixes then end with `<img>`."""
    close, end = engine.token(THINK_CLOSE), engine.token(IM_END)
    pairs = [(r, p) for r, p in zip(requests, prefixes, strict=True) if r.think]
    generations = [
        Generation(
            p.cache,
            SamplingState(TextSampling()),
            frozenset((close, end)),
            r.max_think_tokens,
        )
        for r, p in pairs
    ]
    if not generations:
        return [None] * len(requests)
    for _ in engine.write(generations, torch.stack([p.hidden for _, p in pairs]), cancel):
        pass
    for g in generations:
        # As published: a thought cut off by its limit or by <|im_end|> is not closed.
        closing = [close] if g.stopped_by == close else []
        engine.extend(g.cache, [*g.pending, *closing, *after_think_ids(engine.tokenizer)])
    texts = iter([engine.tokenizer.decode(g.ids).strip() for g in generations])
    return [next(texts) if r.think else None for r in requests]


def _jobs(
    engine: Engine, request: PaintRequest, caches: dict[Branch, SequenceCache]
) -> list[PaintJob]:
    grid = request.grid(engine.config)
    return [
        engine.job(noise, grid, caches, request.sampling) for noise in request.start(engine.config)
    ]
