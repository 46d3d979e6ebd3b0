"""Attention plans on the CPU, and random rows that they join."""

from __future__ import annotations

import torch
from torch import Tensor

from neounify.attention import AttentionPlan, Caches, select
from neounify.model import Layout
from neounify.model.parts import StreamName
from neounify.model.stream import Projected

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH = 4, 2, 8


def plan(layout: Layout, caches: Caches = None, name: str = "auto") -> AttentionPlan:
    """The plan of a backend for one call."""
    return select(CPU, torch.float32, WIDTH, name).plan(layout, caches)


def rows(number: int, seed: int, dtype: torch.dtype = torch.float64) -> Projected:
    """Random queries, keys and values of a stream, which record gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        values = torch.randn(number, heads, WIDTH, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return Projected(draw(HEADS), draw(KV_HEADS), draw(KV_HEADS))


def streams(
    layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[StreamName, Projected]:
    """Random rows of every stream in a layout."""
    return {n: rows(count, seed + i, dtype) for i, (n, count) in enumerate(layout.lengths.items())}
