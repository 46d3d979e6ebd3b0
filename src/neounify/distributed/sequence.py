"""Rows of a pack over ranks: each computes some rows of every stream, and sees the keys of all.

In every layer the ranks gather keys and values, and in the backward pass add up their gradients.
Each has the losses of its rows, so gradients of parameters are sums over the ranks too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from neounify.attention import select_for
from neounify.attention.blocks import BlockAttention
from neounify.attention.gathered import gather_keys
from neounify.distributed.ranks import Ranks
from neounify.model.layout import Layout, Rows
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS, StreamName
from neounify.model.stream import Attend, Projected


class Share(NamedTuple):
    """What a rank computes of a layout: how its rows attend, and which they are, None for all."""

    attend: Attend
    rows: Rows | None


def share_of(model: NeoUnify, layout: Layout, attention: str, ranks: Ranks, kappa: float) -> Share:
    """The share of one of some ranks in a layout without caches.

    `attention` names the backend that serves one rank; rows that are cut attend block by block.
    """
    if ranks.size == 1:
        return Share(select_for(model, attention).plan(layout), None)
    cuts = {name: cut_rows(layout, name, ranks.size, kappa) for name in STREAMS}
    rows = {name: cuts[name][ranks.rank] for name in STREAMS}
    blocks = BlockAttention(layout, None, model.device, rows)
    lengths = {name: [len(part) for part in parts] for name, parts in cuts.items()}
    return Share(SpreadPackAttention(blocks, lengths, ranks), rows)


def cut_rows(layout: Layout, stream: StreamName, parts: int, kappa: float) -> list[range]:
    """Consecutive rows of a stream for each rank, which cost about the same.

    A row costs one and what it sees over κ, as in a pack (`data/packing.py`).
    """
    seen = np.zeros(layout[stream].length)
    for block in layout[stream].blocks:
        keys = block.visible if STREAMS[stream].context else block.visible + block.length
        seen[block.start : block.stop] = keys
        if block.causal:
            seen[block.start : block.stop] -= np.arange(block.length)[::-1]
    cost = np.cumsum(1 + seen / kappa)
    total = cost[-1] if len(cost) else 0.0
    ends = np.searchsorted(cost, total * np.arange(1, parts) / parts, side="right")
    bounds = [0, *(int(end) for end in ends), len(cost)]
    return [range(bounds[n], bounds[n + 1]) for n in range(parts)]


class SpreadPackAttention:
    """Attention of a rank's rows over the keys and values of all; `lengths` are the rows of each
    rank in every stream."""

    def __init__(
        self, blocks: BlockAttention, lengths: Mapping[StreamName, Sequence[int]], ranks: Ranks
    ) -> None:
        self._blocks, self._lengths, self._ranks = blocks, lengths, ranks

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        # All streams are gathered before any attends: backward then has one order on all ranks.
        gathered = {name: self._gather(name, x) for name, x in streams.items()}
        attended = self._blocks(layer, gathered)
        for name, x in gathered.items():
            if not x.q.shape[0]:
                # The backward pass of the gathering needs every rank, with rows or not.
                attended[name] = x.q + 0 * x.k.sum() + 0 * x.v.sum()
        return attended

    def _gather(self, name: StreamName, x: Projected) -> Projected:
        return gather_keys(x, lambda rows: _Gather.apply(rows, self._lengths[name], self._ranks))


class _Gather(torch.autograd.Function):
    """The rows of all ranks, one rank after the other; backward adds up what each rank used."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, lengths: Sequence[int], ranks: Ranks) -> Tensor:
        ctx.lengths, ctx.ranks = lengths, ranks
        longest = max(lengths)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty(ranks.size * longest, *rows.shape[1:])
        distributed.all_gather_single(gathered, padded, group=ranks.group)
        parts = gathered.split(longest)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        lengths, ranks = ctx.lengths, ctx.ranks
        longest = max(lengths)
        padded = gradient.new_zeros(ranks.size * longest, *gradient.shape[1:])
        for place, part in zip(padded.split(longest), gradient.split(lengths), strict=True):
            place[: part.shape[0]] = part
        total = gradient.new_empty(longest, *gradient.shape[1:])
        distributed.reduce_scatter_single(total, padded, group=ranks.group)
        return total[: lengths[ranks.rank]], None, None
