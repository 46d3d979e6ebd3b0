"""A check-up before a long run: does everything that should learn learn, and only that?

One sample per task is learnt by heart, with the stage's own optimizer. What does not come to
light in two minutes there will not in two weeks: a stream without gradient, a frozen part that
moves, a loss that stays, pictures that are noise, blurred, or a grid.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from torch import Tensor

from neounify.data.encode import Encoded, GuidanceDropout
from neounify.data.packing import Pack, make_pack
from neounify.data.sample import DataError, Sample
from neounify.errors import NeounifyError
from neounify.evaluate.scenebench.similarity import psnr, seam_ratio
from neounify.lora.layers import add_lora
from neounify.pipeline import Pipeline
from neounify.train.loop import freeze
from neounify.train.metrics import T_INTERVALS, Metrics
from neounify.train.objective import Counts, loss_of
from neounify.train.optimizers import Optimizers
from neounify.train.recipe import StageRecipe
from neounify.train.setup import Start, build_encoder, build_source

LOOKED_AT = 400
"""Samples that are looked through for one of every task."""
MOST_STEPS = 1000
LEARNT = 0.5
"""Share of its first loss that a task must fall below to count as learning."""
UNLEARNT = 0.05
"""Mean square error of clean images (values -1 to 1) above which pictures tell nothing yet."""
SEAM = 1.5
"""Steps at token borders over steps elsewhere that the eye sees as a grid."""


@dataclass(frozen=True)
class Finding:
    """`good` None is a remark. `advice` says in plain words what to do about it."""

    name: str
    good: bool | None
    what: str
    advice: str = ""


def examine(
    start: Start, stage: StageRecipe, seconds: float = 100, steps: int = MOST_STEPS
) -> Iterator[Finding]:
    """Look at a stage; findings as they come. The model's weights are changed.

    Learning by heart ends after `seconds` or `steps`, or sooner when all tasks are learnt.
    """
    model = start.model
    if stage.lora is None:
        freeze(model, stage.freeze)
    else:
        add_lora(model, stage.lora)
    samples, damaged = _one_per_task(stage)
    yield Finding(
        "data",
        None if damaged else True,
        f"tasks {', '.join(samples)}; {damaged} damaged of {LOOKED_AT} samples",
        "skipped samples are listed in skipped.txt during training" if damaged else "",
    )
    encoder = replace(
        build_encoder(stage, start), dropout=GuidanceDropout(text=0.0, all=0.0), noise_draws=4
    )
    documents = [encoder(s, np.random.default_rng(0)) for s in samples.values()]
    pack = make_pack(documents)
    yield from _gradients(start, stage, pack)
    first, last, taken = _overfit(start, stage, pack, seconds, steps)
    yield from _learning(first, last, taken, stage)
    yield from _times(last)
    yield from _pictures(start, samples, documents, last)


def _one_per_task(stage: StageRecipe) -> tuple[dict[str, Sample], int]:
    source = build_source(stage.data, 0)
    found: dict[str, Sample] = {}
    damaged = 0
    for index in range(LOOKED_AT if source.size is None else min(LOOKED_AT, source.size)):
        try:
            sample = source[index]
        except NeounifyError:
            damaged += 1
            continue
        found.setdefault(sample.task, sample)
    if not found:
        raise DataError(f"none of the first {LOOKED_AT} samples can be used")
    return found, damaged


def _gradients(start: Start, stage: StageRecipe, pack: Pack) -> Iterator[Finding]:
    model = start.model
    model.zero_grad(set_to_none=True)
    _loss(start, stage, pack, 0).backward()
    named = list(model.named_parameters())
    dead = [n for n, p in named if p.requires_grad and (p.grad is None or not p.grad.any())]
    bad = [n for n, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    moving = [n for n, p in named if not p.requires_grad and p.grad is not None]
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    total = sum(p.numel() for _, p in named)
    yield Finding(
        "freezing",
        not moving,
        f"{trained:,} of {total:,} parameters are trained",
        f"frozen parameters have gradients: {_some(moving)}" if moving else "",
    )
    yield Finding(
        "gradients",
        not dead and not bad,
        f"{len(dead)} parameters get none, {len(bad)} are not finite",
        _gradient_advice(dead, bad),
    )
    model.zero_grad(set_to_none=True)


def _gradient_advice(dead: list[str], bad: list[str]) -> str:
    if bad:
        return f"NaN or infinite: {_some(bad)}; look for damaged weights, or train in float32"
    if dead:
        return (
            f"nothing reaches {_some(dead)}: no task of the data uses them, or too much is frozen "
            "(mixed data with pictures to read and to paint reaches everything)"
        )
    return ""


def _overfit(
    start: Start, stage: StageRecipe, pack: Pack, seconds: float, most: int
) -> tuple[dict[str, float], dict[str, float], int]:
    """Learn one pack by heart: (metrics of the first steps, of the last ones, steps taken)."""
    optimizers = Optimizers(start.model, stage.optimizer)
    optimizers.set_factor(1.0)
    trained = [p for p in start.model.parameters() if p.requires_grad]
    until = time.monotonic() + seconds
    first, recent = Metrics(start.model.device), Metrics(start.model.device)
    for step in count(1):
        metrics = first if step <= 5 else recent
        _loss(start, stage, pack, step, metrics).backward()
        torch.nn.utils.clip_grad_norm_(trained, stage.clip)
        optimizers.step()
        optimizers.zero_grad()
        if time.monotonic() > until or step >= most:
            return first.report(), recent.report(), step
        if step % 20 == 0:
            last = recent.report()
            if _all_learnt(first.report(), last, LEARNT / 10):
                return first.report(), last, step
            recent = Metrics(start.model.device)
    raise AssertionError  # the loop above ends by returning


def _loss(
    start: Start, stage: StageRecipe, pack: Pack, seed: int, metrics: Metrics | None = None
) -> Tensor:
    generator = torch.Generator(start.model.device).manual_seed(seed)
    counts = Counts.of([pack])
    return loss_of(start.model, pack, stage.objective, counts, generator, metrics)


def _tasks(report: dict[str, float]) -> list[str]:
    return [name for name in report if name.count("/") == 2 and name.endswith("/loss")]


def _all_learnt(first: dict[str, float], last: dict[str, float], share: float) -> bool:
    return all(last.get(name, 9e9) < share * first[name] for name in _tasks(first))


def _learning(
    first: dict[str, float], last: dict[str, float], steps: int, stage: StageRecipe
) -> Iterator[Finding]:
    for name in _tasks(first):
        before, after = first[name], last.get(name, first[name])
        kind, task, _ = name.split("/")
        good = after < LEARNT * before or after < 0.01
        advice = (
            ""
            if good
            else f"one sample could not be learnt by heart in {steps} steps: raise the learning "
            f"rate ({stage.optimizer.learning_rate:g}), or unfreeze what this task needs"
        )
        yield Finding(f"{task} ({kind})", good, f"loss {before:.3f} → {after:.3f}", advice)


def _times(last: dict[str, float]) -> Iterator[Finding]:
    """The clean image's error must fall as the noise does."""
    errors = [
        last.get(f"image/clean/t{n / T_INTERVALS:.1f}-{(n + 1) / T_INTERVALS:.1f}")
        for n in range(T_INTERVALS)
    ]
    known = [error for error in errors if error is not None]
    if len(known) < 2:
        return
    if min(known) > UNLEARNT:
        yield Finding("error by t", None, "the pictures are not learnt far enough to tell")
        return
    good = known[-1] <= known[0] or max(known) < 0.005
    yield Finding(
        "error by t",
        good,
        "mean square error of the clean image from noise to data: "
        + ", ".join("–" if error is None else f"{error:.4f}" for error in errors),
        ""
        if good
        else "the prediction is worst where the picture is clearest: noise scale or direction of "
        "t differ from what the weights were trained with (config.json, noise_scale…)",
    )


def _pictures(
    start: Start,
    samples: dict[str, Sample],
    documents: list[Encoded],
    last: dict[str, float],
) -> Iterator[Finding]:
    """Paint the learnt prompt again: is it that picture, sharp and without a grid?"""
    known = {d.task: d for d in documents}
    if "t2i" not in known or not known["t2i"].targets:
        return
    target = known["t2i"].targets[0]
    start.model.eval()
    pipe = Pipeline(start.model, start.tokenizer, system_message=start.system_message)
    height, width = target.shape[:2]
    prompt = samples["t2i"].text("user")
    painted = pipe.generate(prompt, width=width, height=height, guidance=1.0, seed=0).images[0]
    pixels = np.asarray(painted)
    likeness = psnr(target, pixels)
    clean = last.get("image/clean", 1.0)
    yield Finding(
        "painting",
        likeness > 15 if clean < UNLEARNT else None,
        f"the learnt prompt paints the learnt picture at {likeness:.1f} dB",
        ""
        if likeness > 15
        else "noise or blur: see the losses above; more time (--seconds) may be enough",
    )
    try:
        seams = seam_ratio(pixels, start.model.config.token_size)
    except DataError:
        return
    yield Finding(
        "seams",
        seams < SEAM,
        f"steps at token borders are {seams:.2f} times those elsewhere",
        ""
        if seams < SEAM
        else "a grid at token borders: train longer at small noise, or use the pixel head",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
