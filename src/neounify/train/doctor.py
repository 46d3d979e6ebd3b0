"""Checks of a supervised stage before a long run: what cannot overfit one batch will not train.

One sample per task is overfitted, with the stage's optimizer, in about two minutes. That reveals a
source without a usable sample, a stream without gradient, a frozen part that changes, a loss that
does not fall, images that are noise, blurred, or show the token grid. A check that needs more steps
than there was time for gives no verdict.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neounify.data.configs import DataConfig, FileData
from neounify.data.draws import FrameTargets, GuidanceDropout
from neounify.data.encode import Encoded, Encoder
from neounify.data.loader import Pack, make_pack, nothing_usable, probe_sources
from neounify.data.reasons import counted, too_many_skipped
from neounify.data.sample import Sample, SampleClip
from neounify.data.sizes import Pixels
from neounify.data.sources import FileSource, Mixture
from neounify.distributed.shards import local
from neounify.errors import ImageError
from neounify.evaluate.metrics import psnr, seam_ratio
from neounify.pipeline import Pipeline
from neounify.text.clips import frame_order
from neounify.train.loss import T_INTERVALS, Counts, LossConfig, Metrics, loss_of
from neounify.train.method import NO_TIME, Finding, StageContext, seeded
from neounify.train.optim import OptimizerSet, take_step
from neounify.train.recipe import StageRecipe
from neounify.train.setup import TrainSetup, prepare_parameters
from neounify.train.supervised import SupervisedConfig, build_encoder

SAMPLES = 400
"""Samples of all sources together that are searched for one of every task."""
MIN_PER_SOURCE = 50
"""Samples that are tried of each source, however many sources there are."""
NOISE_DRAWS = 4
"""Noisy copies of each target."""
MAX_STEPS = 1000
ENOUGH_STEPS = 300
"""Steps after which a sample that is not overfitted counts as one that cannot be."""
MIN_PSNR = 15.0
"""PSNR in dB above which a generated image counts as its overfitted target."""
LOSS_SHARE = 0.5
"""Share of its first loss that a task must fall below to count as training."""
MAX_CLEAN_ERROR = 0.05
"""Mean square error of clean images (values -1 to 1) above which they are not judged."""
MAX_SEAM_RATIO = 1.5
"""Pixel differences at token borders over those elsewhere above which a grid is visible."""


@dataclass(frozen=True)
class Overfit:
    """Result of overfitting one pack: metrics of its first and its last steps.

    `conclusive`: all tasks were overfitted, or there were enough steps to say that some cannot be.
    """

    first: dict[str, float]
    last: dict[str, float]
    steps: int
    seconds: float
    conclusive: bool


def examine(
    context: StageContext, config: SupervisedConfig, seconds: float = 100, steps: int = MAX_STEPS
) -> Iterator[Finding]:
    """Check a stage; yields findings as they come. The model's weights are changed.

    Overfitting ends after `seconds` or `steps`, or sooner when all tasks are overfitted.
    """
    setup, stage = context.setup, context.stage
    prepare_parameters(setup.model, stage, context.recipe.seed)
    samples: dict[str, Sample] = {}
    encoder = build_encoder(setup, config)
    yield from _data(context.mixture, stage.data, encoder, samples)
    if not samples:
        return
    encoder = replace(
        encoder,
        dropout=GuidanceDropout(text=0.0, all=0.0),
        frame_targets=FrameTargets(),
        noise_draws=NOISE_DRAWS,
        max_tokens=None,  # four noisy copies may well be more than a pack of the stage
    )
    documents = [encoder(s, np.random.default_rng(0)) for s in samples.values()]
    pack = make_pack(documents)
    loss = partial(_loss, setup, config.loss, pack)
    yield from _gradients(setup, loss)
    overfit = _overfit(setup, stage, loss, seconds, steps)
    yield from _losses(overfit, stage)
    yield from _times(overfit)
    yield from _generation(setup, samples, documents, overfit)


def _data(
    mixture: Mixture, data: Sequence[DataConfig], encoder: Encoder, samples: dict[str, Sample]
) -> Iterator[Finding]:
    """Try every source; the first sample of each task goes into `samples`."""
    damaged = tried = 0
    remarks = []
    each = max(MIN_PER_SOURCE, SAMPLES // len(mixture.sources))
    probes = probe_sources(mixture, encoder, each)
    for probe, source, settings in zip(probes, mixture.sources, data, strict=True):
        for sample in probe.usable:
            samples.setdefault(sample.task, sample)
        if not probe.usable:
            yield Finding(f"data {probe.name}", False, nothing_usable(probe))
        elif isinstance(settings, FileData) and probe.share > settings.max_skipped:
            limit = settings.max_skipped
            what = too_many_skipped(probe.name, probe.tried, probe.reasons, limit)
            yield Finding(f"data {probe.name}", False, what, probe.skipped[0].message)
        elif probe.skipped:
            remarks.append(f"{probe.name}: {counted(probe.reasons)} ({probe.skipped[0].message})")
        damaged += len(probe.skipped)
        tried += probe.tried
        if isinstance(source, FileSource):
            remarks += source.damage
            if fields := sorted(source.rules.unread):
                remarks.append(f"{probe.name}: fields that are not read: {', '.join(fields)}")
    yield Finding(
        "data",
        False if not samples else None if damaged else True,
        f"tasks {', '.join(samples) or 'none'}; {damaged} damaged of {tried} samples",
        "; ".join(remarks[:3]),
    )


def _gradients(setup: TrainSetup, loss: Callable[[int], Tensor]) -> Iterator[Finding]:
    model, ranks = setup.model, setup.ranks
    model.zero_grad(set_to_none=True)
    loss(0).backward()
    named = list(model.named_parameters())
    # Each rank looks at the rows of a gradient that it holds.
    gradients = [(n, local(p.grad)) for n, p in named if p.requires_grad and p.grad is not None]
    reached = set(chain(*ranks.gather([n for n, gradient in gradients if gradient.any()])))
    dead = [n for n, p in named if p.requires_grad and n not in reached]
    damaged = [n for n, gradient in gradients if not torch.isfinite(gradient).all()]
    bad = list(dict.fromkeys(chain(*ranks.gather(damaged))))
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
            f"no gradient reaches {_some(dead)}: the data has no task for them, or too much is "
            "frozen (data with input images and with image targets reaches everything)"
        )
    return ""


def _overfit(
    setup: TrainSetup,
    stage: StageRecipe,
    loss: Callable[[int, Metrics], Tensor],
    seconds: float,
    max_steps: int,
) -> Overfit:
    """Train on one pack until every task is overfitted, or time or steps are used up."""
    optimizers = OptimizerSet(
        dict(setup.model.named_parameters()), stage.optimizer, clip=stage.clip
    )
    optimizers.set_rate(0)
    began = time.monotonic()
    first, recent = Metrics(setup.model.device), Metrics(setup.model.device)
    for step in count(1):
        metrics = first if step <= 5 else recent
        with seeded(setup.model.device, step):
            loss(step, metrics).backward()
        take_step([optimizers])
        optimizers.zero_grad()
        elapsed = setup.ranks.gather(time.monotonic() - began)[0]
        ended = elapsed > seconds or step >= max_steps
        if ended or step % 20 == 0:
            before, last = first.report(), recent.report()
            done = _all_below(before, last, LOSS_SHARE / 10)
            if ended or done:
                conclusive = done or step >= min(max_steps, ENOUGH_STEPS)
                return Overfit(before, last, step, elapsed, conclusive)
            recent = Metrics(setup.model.device)
    raise AssertionError  # the loop above ends by returning


def _loss(
    setup: TrainSetup, config: LossConfig, pack: Pack, seed: int, metrics: Metrics | None = None
) -> Tensor:
    """The loss of a pack, which every rank computes, so that gradients are its mean over them."""
    generator = torch.Generator(setup.model.device).manual_seed(seed)
    shared = Counts(*(count * setup.ranks.size for count in Counts.of([pack])))
    loss: Tensor = setup.parallel.objective(loss_of, pack, config, shared, generator, metrics)
    return loss


def _tasks(report: dict[str, float]) -> list[str]:
    return [name for name in report if name.count("/") == 2 and name.endswith("/loss")]


def _all_below(first: dict[str, float], last: dict[str, float], share: float) -> bool:
    """Whether every task's last loss is below a share of its first."""
    return all(last.get(name, 9e9) < share * first[name] for name in _tasks(first))


def _losses(overfit: Overfit, stage: StageRecipe) -> Iterator[Finding]:
    for name in _tasks(overfit.first):
        before = overfit.first[name]
        after = overfit.last.get(name, before)
        kind, task, _ = name.split("/")
        good: bool | None = after < LOSS_SHARE * before or after < 0.01
        advice = ""
        if not good and overfit.conclusive:
            advice = (
                f"one sample could not be overfitted in {overfit.steps} steps: raise the learning "
                f"rate ({stage.optimizer.learning_rate:g}), or unfreeze what this task needs"
            )
        elif not good:
            good, advice = None, _no_time(overfit)
        yield Finding(f"{task} ({kind})", good, f"loss {before:.3f} → {after:.3f}", advice)


def _no_time(overfit: Overfit) -> str:
    """Advice where there is no verdict: the time that a verdict needs."""
    needed = overfit.seconds * ENOUGH_STEPS / overfit.steps
    return (
        f"{NO_TIME}: {overfit.steps} steps in {overfit.seconds:.0f} s, a verdict takes "
        f"{ENOUGH_STEPS} (--seconds {needed:.0f})"
    )


def _times(overfit: Overfit) -> Iterator[Finding]:
    """The clean image's error must fall as the noise does."""
    last = overfit.last
    errors = [
        last.get(f"image/clean/t{n / T_INTERVALS:.1f}-{(n + 1) / T_INTERVALS:.1f}")
        for n in range(T_INTERVALS)
    ]
    known = [error for error in errors if error is not None]
    if len(known) < 2:
        return
    if min(known) > MAX_CLEAN_ERROR:
        yield Finding("error by t", None, "the images are not overfitted enough to tell")
        return
    good = known[-1] <= known[0] or max(known) < 0.005
    yield Finding(
        "error by t",
        good if good or overfit.conclusive else None,
        "mean square error of the clean image from noise to data: "
        + ", ".join("–" if error is None else f"{error:.4f}" for error in errors),
        ""
        if good
        else _no_time(overfit)
        if not overfit.conclusive
        else "the prediction is worst where the image is clearest: noise scale or direction of "
        "t differ from what the weights were trained with (config.json, noise_scale…)",
    )


def _generation(
    setup: TrainSetup, samples: dict[str, Sample], documents: list[Encoded], overfit: Overfit
) -> Iterator[Finding]:
    """Generate the overfitted prompt, of an image or a clip: is it the target, without a grid?"""
    known = {d.task: d for d in documents if d.targets}
    task = next((name for name in ("t2i", "t2v") if name in known), None)
    if task is None:
        return
    target = known[task].targets[0]
    if task == "t2v" and setup.model.config.frame_by_frame:
        frames = known[task].targets[::NOISE_DRAWS]
        target = np.stack([frames[place] for place in np.argsort(frame_order(len(frames)))])
    setup.model.eval()
    with setup.parallel.sampling() as model:
        pipe = Pipeline(model, setup.tokenizer, system_message=setup.system_message)
        pixels = _generated(pipe, samples[task], target)
    tall = (-1, *target.shape[-2:])  # the frames of a clip are compared as one tall image
    decibels = psnr(target.reshape(tall), pixels.reshape(tall))
    overfitted = overfit.last.get("image/clean", 1.0) < MAX_CLEAN_ERROR
    like = decibels > MIN_PSNR
    advice = ""
    if not like and overfit.conclusive:
        advice = "noise or blur: see the losses above; more time (--seconds) may be enough"
    elif not like:
        advice = _no_time(overfit)
    yield Finding(
        "generation",
        like if like or (overfitted and overfit.conclusive) else None,
        f"the overfitted prompt gives its target at {decibels:.1f} dB PSNR",
        advice,
    )
    if task == "t2v":
        target, pixels = target[len(target) // 2], pixels[len(target) // 2]
    yield from _seams(target, pixels, setup.model.config.token_size, like, overfit)


def _generated(pipe: Pipeline, sample: Sample, target: Pixels) -> Pixels:
    """What is generated of a sample's prompt, in the size of its target."""
    *_, height, width, _ = target.shape
    prompt, settings = sample.text("user"), dict[str, Any](guidance=1.0, seed=0)
    if target.ndim == 3:
        out = pipe.generate(prompt, width=width, height=height, **settings)
        return np.asarray(out.images[0])
    rates = [clip.fps for clip in sample.clips if isinstance(clip, SampleClip) and clip.loss]
    fps = rates[0] if rates else None
    settings |= {"frames": len(target), "fps": fps}
    out = pipe.generate(prompt, width=width, height=height, **settings)
    return out.videos[0].frames.numpy()


def _seams(
    target: Pixels, image: Pixels, token: int, like: bool, overfit: Overfit
) -> Iterator[Finding]:
    """The generated image must not show more of the token grid than its target."""
    try:
        seams, target_seams = seam_ratio(image, token), seam_ratio(target, token)
    except ImageError:
        return
    good = seams < MAX_SEAM_RATIO * max(1.0, target_seams)
    judged = good or (like and overfit.conclusive)
    advice = ""
    if not good:
        advice = "a grid at token borders: train longer at small noise, or use the pixel head"
        advice = advice if judged else _no_time(overfit)
    yield Finding(
        "seams",
        good if judged else None,
        f"differences at token borders are {seams:.2f} times those elsewhere "
        f"({target_seams:.2f} in the data)",
        advice,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
