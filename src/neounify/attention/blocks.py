"""Attention plans: their protocol, and the reference, block by block of the layout.

Inside a block every query sees the same keys, or the same keys up to itself, so no L × L mask is
ever built and memory grows linearly with the length of the sequence. The reference serves any
layout and any caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neounify.cache import Cache
from neounify.model.layout import Block, Layout, Rows
from neounify.model.parts import STREAMS, UND, StreamName
from neounify.model.stream import Projected

Caches = Sequence[Cache] | None
"""One cache per document; None where nothing is cached, as in training."""


class AttentionPlan(Protocol):
    """Joint attention for one layout and its caches, with all index tensors on the device.

    Called once per layer. New keys and values of the context stream are written to the caches;
    those of other streams are never stored.
    """

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> AttentionPlan | None:
        """A plan, or None for layouts and caches that this kind of attention does not serve."""

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        """Attention output of each stream, [N, heads, d]: the values that its queries gather."""


CAUSAL_CHUNK = 256
"""Queries of a causal block that share one mask; measured, see docs/log.md."""


class BlockAttention:
    """One product per block.

    With `rows`, queries are of these rows of each stream alone, and keys and values of all: a block
    is cut in rows, and a causal one also ends earlier.
    """

    def __init__(
        self, layout: Layout, caches: Caches, device: torch.device, rows: Rows | None = None
    ) -> None:
        self._blocks = {
            name: list(_pieces(layout, name, None if rows is None else rows[name]))
            for name in STREAMS
        }
        self._ranges = layout[UND].ranges
        self._caches = caches
        with torch.inference_mode(False):
            self._masks = {
                block.start: _causal_masks(block, device)
                for _, block in self._blocks[UND]
                if block.causal and 1 < block.length < block.visible
            }
        for cache, (start, stop) in zip(caches or (), self._ranges, strict=caches is not None):
            cache.reserve(stop - start)

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> BlockAttention:
        return cls(layout, caches, device)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        context = streams.get(UND)
        if context is not None and self._caches is not None:
            for cache, (start, stop) in zip(self._caches, self._ranges, strict=True):
                if stop > start:
                    cache.write(layer, context.k[start:stop], context.v[start:stop])
        attended = {}
        for name, x in streams.items():
            attend = self._attend_context if STREAMS[name].context else attend_apart
            pieces = []
            for queries, block in self._blocks[name]:
                keys = self._keys(layer, block, streams)
                pieces.append(attend(x, block, *keys, queries))
            attended[name] = _join(pieces) if pieces else x.q
        return attended

    def _attend_context(
        self, x: Projected, block: Block, k: Tensor, v: Tensor, queries: slice
    ) -> Tensor:
        """Queries of a block of the context: the last of the keys are its own."""
        q = x.q[queries]
        if not block.causal or block.length == 1:
            return _attend(q, k, v)
        if block.length == block.visible:
            return _attend(q, k, v, is_causal=True)
        pieces = []
        for rows, mask in self._masks[block.start]:
            seen = mask.shape[1]
            pieces.append(_attend(q[rows], k[:, :seen], v[:, :seen], mask=mask))
        return _join(pieces)

    def _keys(
        self, layer: int, block: Block, streams: Mapping[StreamName, Projected]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, visible, d] of the context that a block sees."""
        if self._caches is not None:
            return self._caches[block.document].read(layer, block.visible)
        start = self._ranges[block.document][0]
        visible = block.visible if UND in streams else 0
        x = streams.get(UND) or next(iter(streams.values()))
        rows = slice(start, start + visible)
        return x.k[rows].transpose(0, 1), x.v[rows].transpose(0, 1)


def _join(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _pieces(
    layout: Layout, stream: StreamName, rows: range | None
) -> Iterator[tuple[slice, Block]]:
    """Queries, counted from the first of the rows, and the block that they see the keys of."""
    for block in layout[stream].blocks:
        start, stop, first = block.start, block.stop, 0
        if rows is not None:
            start, stop, first = max(start, rows.start), min(stop, rows.stop), rows.start
            if start >= stop:
                continue
        queries = slice(start - first, stop - first)
        if STREAMS[stream].context:
            later = block.stop - stop if block.causal else 0
            block = replace(block, start=start, stop=stop, visible=block.visible - later)
        yield queries, block


def attend_apart(
    x: Projected, block: Block, k: Tensor, v: Tensor, queries: slice | None = None
) -> Tensor:
    """A block of a stream that is not context: it sees the context and itself.

    `queries` are the rows of q that belong to the block, where q has other rows than k and v.
    """
    rows = slice(block.start, block.stop)
    q, block_k, block_v = x.q[queries or rows], x.k[rows], x.v[rows]
    block_k, block_v = block_k.transpose(0, 1), block_v.transpose(0, 1)
    if block.visible:
        block_k, block_v = torch.cat([k, block_k], dim=1), torch.cat([v, block_v], dim=1)
    return _attend(q, block_k, block_v)


Masks = Sequence[tuple[slice, Bool[Tensor, "_n _m"]]]


def _causal_masks(block: Block, device: torch.device) -> Masks:
    """Masks of a causal block behind others: for pieces of its queries, the keys that each sees."""
    before, masks = block.visible - block.length, []
    for start in range(0, block.length, CAUSAL_CHUNK):
        stop = min(start + CAUSAL_CHUNK, block.length)
        mask = torch.ones(stop - start, before + stop, dtype=torch.bool, device=device)
        masks.append((slice(start, stop), mask.tril(before + start)))
    return masks


def _attend(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "kv m d"],
    v: Float[Tensor, "kv m d"],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "n heads d"]:
    out = scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q.shape[1] != k.shape[0],
    )
    return out.squeeze(0).transpose(0, 1)
