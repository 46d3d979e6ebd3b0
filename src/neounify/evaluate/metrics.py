"""Metrics: similarity of images and texts, visibility of the token grid, rates with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neounify.errors import ImageError, RequestError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

MAX_PSNR = 100.0
"""PSNR in dB of equal images, where the equation gives infinity."""


def psnr(a: Pixels, b: Pixels, mask: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10·log₁₀(255² / mean (a − b)²), at most `MAX_PSNR`.

    Args:
        a, b: uint8 [h, w, 3].
        mask: [h, w]; only these pixels count.
    """
    _check_pair(a, b)
    squares = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    if mask is not None:
        if not mask.any():
            raise ImageError("no pixel is left to compare")
        squares = squares[mask]
    error = float(squares.mean())
    return MAX_PSNR if error == 0 else min(MAX_PSNR, float(10 * np.log10(255**2 / error)))


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity, mean over windows and channels; 1 for equal images.

    (2 μₐμ_b + C₁)(2 σ_ab + C₂) / ((μₐ² + μ_b² + C₁)(σₐ² + σ_b² + C₂)) with Gaussian windows of
    11×11 and σ = 1.5, C₁ = (0.01·255)², C₂ = (0.03·255)²; only windows wholly inside count.
    """
    _check_pair(a, b)
    if min(a.shape[:2]) < 11:
        raise ImageError(f"SSIM needs at least 11×11 pixels, not {a.shape[1]}×{a.shape[0]}")
    x, y = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _gaussian(x), _gaussian(y)
    var_x = _gaussian(x * x) - mean_x**2
    var_y = _gaussian(y * y) - mean_y**2
    covariance = _gaussian(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(likeness.mean())


def seam_ratio(image: Pixels, token: int = 16) -> float:
    """Mean step across the borders of the token grid over the mean step elsewhere.

    1 means no seams. Steps are absolute differences of neighbouring pixels (mean over channels,
    of 255). So that the outlines of objects do not count, only places are taken where the steps
    one and two pixels to either side are below `_SMOOTH`, and both means are over the lower three
    quarters of them. Half a grey level is added to each, so a perfectly flat image scores 1.

    Args:
        image: uint8 [h, w, 3].
        token: side of a token in pixels, at least 4.
    """
    if token < 4:
        raise ImageError(f"a token of {token} pixels is too small to tell borders from the rest")
    across: list[Floats] = []
    elsewhere: list[Floats] = []
    for axis in (0, 1):
        steps = np.abs(np.diff(image.astype(np.float64), axis=axis)).mean(-1)
        steps = steps if axis == 1 else steps.T
        length = steps.shape[1]
        beside = np.stack([steps[:, 2 + o : length - 2 + o] for o in (-2, -1, 1, 2)])
        smooth = beside.max(0) < _SMOOTH
        inner = steps[:, 2 : length - 2]
        # steps[:, k] lies between pixels k and k + 1: a border where k + 1 is a multiple.
        border = (np.arange(2, length - 2) + 1) % token == 0
        across.append(inner[:, border][smooth[:, border]])
        elsewhere.append(inner[:, ~border][smooth[:, ~border]])
    at_borders, other = np.concatenate(across), np.concatenate(elsewhere)
    if not len(at_borders) or not len(other):
        raise ImageError("the image has no smooth place at which seams could be seen")
    return (_mean_of_lower(at_borders) + 0.5) / (_mean_of_lower(other) + 0.5)


_SMOOTH = 24.0
_KEPT = 0.75


def _mean_of_lower(steps: Floats) -> float:
    kept = max(1, int(_KEPT * len(steps)))
    return float(np.partition(steps, kept - 1)[:kept].mean())


def _gaussian(channels: Floats) -> Floats:
    """Gaussian mean over 11×11 windows, σ 1.5, where the window fits; [h − 10, w − 10, 3]."""
    at = np.arange(-5, 6)
    weights = np.exp(-(at**2) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (0, 1):
        length = channels.shape[axis] - 10
        slices = [np.take(channels, range(o, o + length), axis=axis) for o in range(11)]
        channels = np.tensordot(weights, np.stack(slices), axes=1)
    return channels


def _check_pair(a: Pixels, b: Pixels) -> None:
    if a.shape != b.shape or a.ndim != 3 or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ImageError(
            f"two uint8 images of one size are compared, not {a.dtype} {list(a.shape)}"
            f" and {b.dtype} {list(b.shape)}"
        )


def levenshtein(a: str, b: str) -> int:
    """Edits that turn one text into the other: characters inserted, removed, replaced."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


_Z95 = 1.959963984540054  # the normal quantile of 97.5 %


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate, both ends 0 to 1."""
    if not 0 <= successes <= trials or trials == 0:
        raise RequestError(f"no rate of {successes} in {trials}")
    rate, z2 = successes / trials, _Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Rate:
    """A rate of success: `correct` of `number`."""

    correct: int
    number: int

    @property
    def value(self) -> float:
        """The share that was right, 0 to 1."""
        return self.correct / self.number

    def to_json(self) -> dict[str, float | int]:
        """Share, 95 % interval and counts."""
        low, high = wilson_interval(self.correct, self.number)
        return {
            "rate": round(self.value, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "correct": self.correct,
            "n": self.number,
        }

    def __str__(self) -> str:
        low, high = wilson_interval(self.correct, self.number)
        return f"{100 * self.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"
