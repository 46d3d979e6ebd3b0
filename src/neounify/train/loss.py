"""Supervised loss: w_text · CE(text) + w_image · ‖v̂ - v‖², and its means by task and by t.

    z_t = t · x + (1 - t) · σ · ε          one t per image, ε ~ N(0, 1)
    v̂ - v = (x̂ - x) / max(1 - t, t_eps)    mean over the pixels of a token, then over tokens, or
                                           over those of each image and then over images

This is the published recipe. The rules of path, time and noise are those of `flow/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from neounify.attention import select_for
from neounify.config import ModelConfig
from neounify.config.model import UndPixels
from neounify.config.ranges import STRICT, Count, Finite, NonNegative, Positive, check_weights
from neounify.data.loader import Pack
from neounify.data.sample import TASKS, DataError
from neounify.data.sizes import Pixels
from neounify.distributed.sequence import Share
from neounify.flow.path import noise_scale, noisy, shift_time, velocity
from neounify.image.clips import join_rows, tube_rows
from neounify.image.pixels import normalise_und, patchify
from neounify.model.neo import Logits, ModelBatch, NeoUnify
from neounify.model.parts import GEN, UND
from neounify.runtime.devices import abilities
from neounify.runtime.plan import ExecutionPlan, plan_execution

T_INTERVALS = 5
"""Equal intervals of t over [0, 1] for which the image loss is reported."""

_TEXT = ("loss", "correct", "count")
_IMAGE = ("loss", "clean", "count")


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """Weights of the losses and the distribution of t.

    t is logit-normal, 1 / (1 + exp(-(t_mean + t_std · n))), then shifted by `time_shift`, or by
    the S of the first of `side_shifts`, ascending (side in pixels, S), whose side is at least the
    shorter side of the image. `image_mean` is over all noisy tokens, or over those of each image
    and then over images. `task_weights` multiply the loss of a task, 1 where not named.
    """

    text_weight: NonNegative = 0.1
    image_weight: NonNegative = 1.0
    t_mean: Finite = -0.8
    t_std: NonNegative = 0.8
    time_shift: Positive = 1.0
    side_shifts: tuple[tuple[Count, Positive], ...] = ()
    image_mean: Literal["tokens", "images"] = "tokens"
    task_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.text_weight and not self.image_weight:
            raise ValueError("text_weight and image_weight are both 0: there is nothing to train")
        sides = [side for side, _ in self.side_shifts]
        if sides != sorted(set(sides)):
            raise ValueError(f"side_shifts: the sides must ascend, got {sides}")
        if sides and self.time_shift != 1:
            raise ValueError(
                f"time_shift {self.time_shift:g} and side_shifts both shift t: name one"
            )
        if self.task_weights is not None:
            check_weights("task_weights", self.task_weights, TASKS)

    def draw_t(self, sides: Sequence[int], generator: torch.Generator) -> Float[Tensor, " j"]:
        """One time per image, in (0, 1). `sides` are their shorter sides in pixels.

        Raises DataError for a side above the last of `side_shifts`.
        """
        device = generator.device
        normal = torch.randn(len(sides), generator=generator, device=device)
        shift: float | Tensor = self.time_shift
        if self.side_shifts:
            shift = torch.tensor([self._shift_of(side) for side in sides], device=device)
        return shift_time(torch.sigmoid(self.t_mean + self.t_std * normal), shift)

    def _shift_of(self, side: int) -> float:
        for most, shift in self.side_shifts:
            if side <= most:
                return shift
        raise DataError(
            f"an image to generate has a shorter side of {side} pixels, loss.side_shifts ends at "
            f"{most}: bound images by target_pixels or target_buckets"
        )

    def weights(self, tasks: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The weight of each label or image by its task."""
        weights = self.task_weights or {}
        table = torch.tensor([weights.get(task, 1.0) for task in TASKS], device=tasks.device)
        return table[tasks]


class Counts(NamedTuple):
    """Labels, noisy tokens and noisy images of a whole step, the denominators of its losses."""

    labels: int
    tokens: int
    images: int

    @staticmethod
    def of(packs: Sequence[Pack]) -> Counts:
        return Counts(
            sum(len(pack.label_ids) for pack in packs),
            sum(pack.layout[GEN].length for pack in packs),
            sum(len(pack.layout[GEN].grids) for pack in packs),
        )


@dataclass(frozen=True, eq=False)
class Noised:
    """The noisy images and clips of a pack: G tokens of J of them.

    Rows of images are padded where there are clips too, whose rows are longer; `padding` is by how
    much the mean over a row is smaller for it, None where no row is padded.
    """

    clean: Float[Tensor, "g ccc"]
    z: Float[Tensor, "g ccc"]
    t: Float[Tensor, " j"]
    noise_scale: Float[Tensor, " j"]
    lengths: Int[Tensor, " j"]
    padding: Float[Tensor, " j"] | None = None


def add_noise(
    pack: Pack, model_config: ModelConfig, config: LossConfig, generator: torch.Generator
) -> Noised:
    """Draw t and noise for every target of a pack, on the generator's device."""
    device = generator.device
    grids = pack.layout[GEN].grids
    lengths = torch.tensor([grid.length for grid in grids], device=device)
    clean = _tokens(pack.targets, model_config, device)
    side = model_config.token_size
    t = config.draw_t([side * min(grid.rows, grid.columns) for grid in grids], generator)
    sigma = torch.tensor([noise_scale(grid.length, model_config.flow, cap=False) for grid in grids])
    sigma = sigma.to(device)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    per_token = [
        x.repeat_interleave(lengths, output_size=len(clean)).unsqueeze(1) for x in (t, sigma)
    ]
    padding = None
    if len({grid.kind for grid in grids}) > 1:
        image, tube = model_config.token_width, model_config.tube_width
        widths = [tube if grid.tubes else image for grid in grids]
        padding = clean.shape[1] / torch.tensor(widths, device=device)
    return Noised(clean, noisy(clean, noise, *per_token), t, sigma, lengths, padding)


def loss_of(
    model: NeoUnify,
    pack: Pack,
    config: LossConfig,
    counts: Counts,
    generator: torch.Generator,
    metrics: Metrics | None = None,
    plan: ExecutionPlan | None = None,
    share: Share | None = None,
) -> Tensor:
    """The share of one pack in the loss of its step; a scalar to call backward on.

    `plan` are the limits of the model on its device; None makes them anew. `share` is what is
    computed here of the pack, all by default; losses of shares add up to that of the pack.
    """
    device = model.device
    plan = plan or plan_execution(model.config, device, model.compute_dtype)
    noised = add_noise(pack, model.config, config, generator) if pack.targets else None
    attend, rows = share or Share(select_for(model, plan.attention).plan(pack.layout), None)
    labels = Labels.of(pack, None if rows is None else rows[UND], device)
    batch = ModelBatch(
        layout=pack.layout,
        attend=attend,
        ids=pack.ids.to(device),
        images=_und_images(pack.images, device, model.config.und_pixels),
        z=None if noised is None else noised.z,
        t=None if noised is None else noised.t,
        noise_scale=None if noised is None else noised.noise_scale,
        logit_rows=labels.rows,
        rows=rows,
    )
    score = partial(_token_losses, ids=labels.ids, rows=plan.logits_rows)
    (losses, correct), clean, _ = model(batch, score)
    loss = torch.zeros((), device=device)
    # Of a share these hang on the layers even where it has neither label nor image.
    if len(pack.label_ids):
        if metrics is not None:
            metrics.add_text(labels.tasks, losses.detach(), correct)
        text = (losses * config.weights(labels.tasks)).sum()
        loss = loss + config.text_weight * text / counts.labels
    if noised is not None:
        image = slice(None) if rows is None else slice(rows[GEN].start, rows[GEN].stop)
        error = _image_loss(model, pack, config, noised, image, clean, metrics)
        loss = loss + error / max(1, getattr(counts, config.image_mean))
    return loss


class Labels(NamedTuple):
    """Labels of some understanding rows, which count from the first of them."""

    rows: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]
    tasks: Int[Tensor, " n"]

    @staticmethod
    def of(pack: Pack, rows: range | None, device: torch.device) -> Labels:
        """The labels of a pack, or those of some of its rows."""
        labels = Labels(pack.label_rows, pack.label_ids, pack.label_tasks)
        if rows is not None:
            inside = (labels.rows >= rows.start) & (labels.rows < rows.stop)
            labels = Labels(*(tensor[inside] for tensor in labels))
            labels = labels._replace(rows=labels.rows - rows.start)
        return Labels(*(tensor.to(device) for tensor in labels))


def _token_losses(
    logits: Logits, states: Float[Tensor, "n d"], ids: Int[Tensor, " n"], rows: int
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Cross-entropy of each label, and whether it is the most likely token."""

    def score(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits(states).float()
        return cross_entropy(scores, ids, reduction="none"), scores.detach().argmax(-1) == ids

    return score_in_pieces(score, states, ids, rows)


def score_in_pieces(
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    states: Float[Tensor, "n d"],
    ids: Int[Tensor, " n"],
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Both results of `score` for every label; logits of `rows` labels are in memory at a time."""
    pieces = list(zip(states.split(rows), ids.split(rows), strict=True))
    if len(pieces) == 1:
        return score(states, ids)
    results = [checkpoint(score, s, i, use_reentrant=False) for s, i in pieces]
    return torch.cat([first for first, _ in results]), torch.cat([second for _, second in results])


def _image_loss(
    model: NeoUnify,
    pack: Pack,
    config: LossConfig,
    noised: Noised,
    rows: slice,
    prediction: Tensor,
    metrics: Metrics | None,
) -> Tensor:
    """The weighted sum over the rows of noisy tokens that `prediction` is of.

    It is that of tokens, or of the means of images.
    """
    images = torch.arange(len(noised.t), device=noised.t.device)
    owners = images.repeat_interleave(noised.lengths, output_size=len(noised.clean))[rows]
    t = noised.t[owners].unsqueeze(1)
    eps = model.config.flow.t_eps_training
    # velocity(x̂) - velocity(x): z cancels, so it is the velocity of the difference.
    error = velocity(prediction.float() - noised.clean[rows], torch.zeros_like(t), t, eps)
    per_token = error.square().mean(dim=1)
    if noised.padding is not None:
        per_token = per_token * noised.padding[owners]
    tasks = pack.target_tasks.to(per_token.device)
    if metrics is not None:
        remaining = torch.clamp(1 - t.squeeze(1), min=eps)
        clean_error = per_token.detach() * remaining.square()
        metrics.add_image(tasks, noised.t, owners, per_token.detach(), clean_error)
    weights = config.weights(tasks)[owners]
    if config.image_mean == "images":
        weights = weights / noised.lengths[owners]
    return config.image_weight * (per_token * weights).sum()


def _und_images(images: Sequence[Pixels], device: torch.device, kind: UndPixels) -> list[Tensor]:
    """Clean images and tubes for the understanding stream, [channels, height, width] each.

    Those of a tube have frames in front.
    """
    tensors: list[Tensor] = []
    for stack in _stacks(images, device):
        tensors += normalise_und(stack.float() / 255, kind).unbind()
    return tensors


def _tokens(
    images: Sequence[Pixels], config: ModelConfig, device: torch.device
) -> Float[Tensor, "g ccc"]:
    """Target images and clips as token rows in [-1, 1], padded to one width."""
    rows = []
    for stack in _stacks(images, device):
        pixels = stack.float() / 127.5 - 1
        if pixels.ndim == 4:
            rows.append(patchify(pixels, config.token_size, config.channels).flatten(0, 1))
        else:
            assert config.video is not None
            rows += [tube_rows(x, config.token_size, config.video.tube_frames) for x in pixels]
    return join_rows(rows)


def _stacks(
    images: Sequence[Pixels], device: torch.device
) -> Iterator[UInt8[Tensor, "_n *_frames _channels _height _width"]]:
    """Images and clips in order, consecutive ones of one size as one tensor."""
    for _, same in groupby(images, key=lambda image: image.shape):
        yield torch.from_numpy(np.stack(list(same))).to(device).movedim(-1, -3)


class Metrics:
    """Running sums on the model's device; read once per report, so that training never waits.

    They are float64, or float32 on a device without it: sums of a step, then of steps, so that
    their rounding is far below what a log shows. No gradient or step depends on them.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        exact = abilities(torch.device(device)).float64
        dtype = torch.float64 if exact else torch.float32
        self.text = torch.zeros(len(TASKS), len(_TEXT), dtype=dtype, device=device)
        self.image = torch.zeros(len(TASKS), T_INTERVALS, len(_IMAGE), dtype=dtype, device=device)

    def add_text(self, tasks: Tensor, losses: Tensor, correct: Tensor) -> None:
        """Per label: its task, its cross entropy, whether the likeliest token was correct."""
        values = torch.stack([losses, correct, torch.ones_like(losses)], dim=1)
        self.text.index_add_(0, tasks, values.to(self.text.dtype))

    def add_image(
        self, tasks: Tensor, t: Tensor, owners: Tensor, losses: Tensor, clean: Tensor
    ) -> None:
        """Per image: task and t; per token: its image, velocity loss and clean-image error."""
        interval = (t * T_INTERVALS).long().clamp(0, T_INTERVALS - 1)
        index = (tasks * T_INTERVALS + interval)[owners]
        values = torch.stack([losses, clean, torch.ones_like(losses)], dim=1)
        self.image.flatten(0, 1).index_add_(0, index, values.to(self.image.dtype))

    def merge(self, other: Metrics) -> None:
        """Add other sums."""
        self.text += other.text
        self.image += other.image

    def report(self) -> dict[str, float]:
        """Means by name: text/loss, text/vqa/loss, text/accuracy, image/loss, image/t0.2-0.4, …

        `image/clean` is the mean square error of x̂ in [-1, 1]. Names without data are missing.
        """
        text, image = self.text.cpu().double(), self.image.cpu().double()
        means: dict[str, float] = {}
        _put(means, "text/loss", text.sum(0), 0)
        _put(means, "text/accuracy", text.sum(0), 1)
        _put(means, "image/loss", image.sum((0, 1)), 0)
        _put(means, "image/clean", image.sum((0, 1)), 1)
        for number, task in enumerate(TASKS):
            _put(means, f"text/{task}/loss", text[number], 0)
            _put(means, f"text/{task}/accuracy", text[number], 1)
            _put(means, f"image/{task}/loss", image[number].sum(0), 0)
        for interval in range(T_INTERVALS):
            low, high = interval / T_INTERVALS, (interval + 1) / T_INTERVALS
            _put(means, f"image/t{low:.1f}-{high:.1f}", image[:, interval].sum(0), 0)
            _put(means, f"image/clean/t{low:.1f}-{high:.1f}", image[:, interval].sum(0), 1)
        return means


def _put(means: dict[str, float], name: str, sums: Tensor, which: int) -> None:
    count = float(sums[2])
    if count:
        means[name] = float(sums[which]) / count
