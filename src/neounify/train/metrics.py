"""Sums that describe a stretch of training: per task, and per interval of t."""

from __future__ import annotations

import torch
from torch import Tensor

from neounify.data.sample import TASKS

T_INTERVALS = 5
"""Equal intervals of t over [0, 1] for which the image loss is reported."""

_TEXT = ("loss", "right", "count")
_IMAGE = ("loss", "clean", "count")


class Metrics:
    """Running sums on the model's device; read once per report, so that training never waits."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.text = torch.zeros(len(TASKS), len(_TEXT), dtype=torch.float64, device=device)
        self.image = torch.zeros(
            len(TASKS), T_INTERVALS, len(_IMAGE), dtype=torch.float64, device=device
        )

    def add_text(self, tasks: Tensor, losses: Tensor, right: Tensor) -> None:
        """Per label: its task, its cross entropy, whether the likeliest token was right."""
        values = torch.stack([losses, right, torch.ones_like(losses)], dim=1)
        self.text.index_add_(0, tasks, values.double())

    def add_image(
        self, tasks: Tensor, t: Tensor, lengths: Tensor, losses: Tensor, clean: Tensor
    ) -> None:
        """Per image: task, t and token count; per token: velocity loss and clean-image error."""
        interval = (t * T_INTERVALS).long().clamp(0, T_INTERVALS - 1)
        place = (tasks * T_INTERVALS + interval).repeat_interleave(lengths)
        values = torch.stack([losses, clean, torch.ones_like(losses)], dim=1)
        self.image.flatten(0, 1).index_add_(0, place, values.double())

    def merge(self, other: Metrics) -> None:
        """Add the sums of another stretch."""
        self.text += other.text
        self.image += other.image

    def report(self) -> dict[str, float]:
        """Means by name: text/loss, text/vqa/loss, text/accuracy, image/loss, image/t0.2-0.4, …

        `image/clean` is the mean square error of x̂ in [-1, 1]. Names without data are missing.
        """
        text, image = self.text.cpu(), self.image.cpu()
        found: dict[str, float] = {}
        _put(found, "text/loss", text.sum(0), 0)
        _put(found, "text/accuracy", text.sum(0), 1)
        _put(found, "image/loss", image.sum((0, 1)), 0)
        _put(found, "image/clean", image.sum((0, 1)), 1)
        for number, task in enumerate(TASKS):
            _put(found, f"text/{task}/loss", text[number], 0)
            _put(found, f"text/{task}/accuracy", text[number], 1)
            _put(found, f"image/{task}/loss", image[number].sum(0), 0)
        for interval in range(T_INTERVALS):
            low, high = interval / T_INTERVALS, (interval + 1) / T_INTERVALS
            _put(found, f"image/t{low:.1f}-{high:.1f}", image[:, interval].sum(0), 0)
            _put(found, f"image/clean/t{low:.1f}-{high:.1f}", image[:, interval].sum(0), 1)
        return found


def _put(found: dict[str, float], name: str, sums: Tensor, which: int) -> None:
    count = float(sums[2])
    if count:
        found[name] = float(sums[which]) / count
