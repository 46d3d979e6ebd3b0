"""Draws for a sample in training: whether it keeps its prompt, which frames are targets."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from neounify.config.ranges import STRICT, Fraction, NonNegative
from neounify.data.sample import DataError

Drop = Literal["none", "text", "all"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuidanceDropout:
    """Probabilities that a generation sample loses its text, or text and images, for guidance."""

    text: Fraction = 0.1
    all: Fraction = 0.1

    def __post_init__(self) -> None:
        if self.text + self.all > 1:
            raise DataError(
                f"text {self.text} + all {self.all} must be at most 1: a sample loses one or the "
                "other"
            )

    def draw(self, rng: np.random.Generator) -> Drop:
        x = rng.random()
        if x < self.all:
            return "all"
        return "text" if x < self.all + self.text else "none"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FrameTargets:
    """Shares of clips by their targets, for models that generate clips frame by frame.

    Targets are `all` frames, only the `first`, the `last` behind the first, or one of those
    `between` them, drawn evenly. Frames before it in the order of generation (`frame_order`) are
    seen clean, those after it are left out. Of a clip that continues another one, `first` and
    `last` both mean its last frame. Shares need not sum to 1.
    """

    all: NonNegative = 1.0
    first: NonNegative = 0.0
    last: NonNegative = 0.0
    between: NonNegative = 0.0

    def __post_init__(self) -> None:
        if not self.all + self.first + self.last + self.between:
            raise DataError("frame_targets: one share must be above 0")

    def draw(self, rng: np.random.Generator, frames: int, *, follows: bool) -> range:
        """Places of the targets in the order of a clip of `frames`.

        All of them where the clip has none of those that have a share.
        """
        ends = min(1 if follows else 2, frames)
        places = {
            "all": range(frames),
            "first": range(1),
            "last": range(ends - 1, ends),
            "between": range(ends, frames),
        }
        shares = {name: getattr(self, name) for name in places if len(places[name])}
        weights = np.array(list(shares.values()))
        if not weights.any():
            return places["all"]
        name = list(shares)[rng.choice(len(shares), p=weights / weights.sum())]
        if name != "between":
            return places[name]
        place = int(rng.choice(places[name]))
        return range(place, place + 1)
