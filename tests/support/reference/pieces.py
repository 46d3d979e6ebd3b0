"""Weights, numbers and small functions, each for one vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Weights: TypeAlias = Mapping[str, Array]
"""Float64 arrays by published tensor name."""


@dataclass(frozen=True)
class Facts:
    """What the weights alone do not say."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    patch: int
    merge: int
    theta: float
    theta_hw: float
    theta_vision: float
    eps: float
    top_k_und: int = 1
    top_k_gen: int = 1
    renormalise: bool = False
    pixel_head_shuffles: tuple[int, int, int] | None = None
    """The three pixel-shuffle factors of the pixel head; None means the flow head."""

    @property
    def token_side(self) -> int:
        return self.patch * self.merge


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean x² + eps) · weight, for one vector."""
    mean_square = sum(float(value) ** 2 for value in x) / len(x)
    return x / math.sqrt(mean_square + eps) * weight


def linear(x: Array, weights: Weights, name: str) -> Array:
    """W x + b, for one vector; the bias is there or not."""
    out = weights[f"{name}.weight"] @ x
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def gelu(x: Array) -> Array:
    """The exact form: x · Φ(x) with the error function."""
    flat = [value * 0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in x.ravel()]
    return np.array(flat, dtype=np.float64).reshape(x.shape)


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def rotate_halves(part: Array, position: float, base: float) -> Array:
    """Rotate pair (i, i + n/2) of a part of width n by position · base^(−2i/n)."""
    half = len(part) // 2
    out = np.empty_like(part)
    for i in range(half):
        angle = position * base ** (-2.0 * i / len(part))
        a, b = part[i], part[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def rotate_adjacent(part: Array, position: int, base: float) -> Array:
    """Rotate pair (2i, 2i + 1) of a part of width n by position · base^(−2i/n)."""
    out = np.empty_like(part)
    for i in range(len(part) // 2):
        angle = position * base ** (-2.0 * i / len(part))
        a, b = part[2 * i], part[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def norm_and_rotate(
    head: Array, position: tuple[float, int, int], norm: Array, norm_hw: Array, facts: Facts
) -> Array:
    """Norm and rotate one query or key head, cut as [t: d/2 | h: d/4 | w: d/4]."""
    d = len(head)
    time = rms_norm(head[: d // 2], norm, facts.eps)
    space = rms_norm(head[d // 2 :], norm_hw, facts.eps)
    t, h, w = position
    return np.concatenate(
        [
            rotate_halves(time, t, facts.theta),
            rotate_halves(space[: d // 4], h, facts.theta_hw),
            rotate_halves(space[d // 4 :], w, facts.theta_hw),
        ]
    )
