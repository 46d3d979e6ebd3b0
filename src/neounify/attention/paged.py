"""Sequences of one paged cache that take one token each: one gather per layer serves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from neounify.attention.plan import Caches, attend_tokens
from neounify.cache.paged import PagedSequence
from neounify.model.layout import Layout
from neounify.model.parts import UND, StreamName
from neounify.model.stream import Projected


class PagedAttention:
    """One new token of every sequence, written to its slot and attending to all before it."""

    def __init__(self, sequences: Sequence[PagedSequence], device: torch.device) -> None:
        pool = sequences[0].pool
        self._keys, self._values = pool.keys.unbind(0), pool.values.unbind(0)
        size = pool.block_size
        lengths = np.array([sequence.length + 1 for sequence in sequences])
        longest = int(lengths.max())
        blocks = pool.blocks_for(longest)
        tables = np.zeros((len(sequences), blocks), dtype=np.int64)
        for table, sequence in zip(tables, sequences, strict=True):
            used = sequence.block_table[:blocks]
            table[: len(used)] = used
        slots = (tables[:, :, None] * size + np.arange(size)).reshape(len(sequences), -1)
        slots, real = slots[:, :longest], np.arange(longest) < lengths[:, None]
        new = slots[np.arange(len(sequences)), lengths - 1]
        # What lies behind a sequence's end is masked, but a weight of 0 times NaN would be NaN.
        padded = np.where(real, slots, pool.zero_slot)
        self._shape = padded.shape
        self._slots = torch.from_numpy(padded.reshape(-1)).to(device)
        self._new = torch.from_numpy(new).to(device)
        self._mask = torch.from_numpy(real).to(device)[:, None, None]

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PagedAttention | None:
        sequences = [cache for cache in caches or () if isinstance(cache, PagedSequence)]
        if len(sequences) < 2 or len(sequences) < len(layout.documents):
            return None
        if not layout.is_decode or len({id(sequence.pool) for sequence in sequences}) > 1:
            return None
        for sequence in sequences:
            sequence.reserve(1)
        return cls(sequences, device)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[UND]
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._new, x.k)
        values.index_copy_(0, self._new, x.v)
        k, v = (
            memory.index_select(0, self._slots).unflatten(0, self._shape).transpose(1, 2)
            for memory in (keys, values)
        )
        return {UND: attend_tokens(x.q, k, v, self._mask)}
