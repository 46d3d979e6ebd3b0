"""Attention in tensors that never move: lengths and pages are values on the device, no shapes.

A plan of this file is built once for a number of sequences or images and given new values in place,
so that a recorded call (`neounify.engine.graphs`) serves many steps. What lies behind a length is
masked. Where a kernel reads pages or lengths, it is called (`neounify.attention.varlen`); else the
keys are gathered for one masked product. Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from neounify.attention.backends import attend_slots
from neounify.attention.padded import masked_attention
from neounify.attention.varlen import Kernel
from neounify.cache import PagedKVCache, PagedSequence, SequenceCache
from neounify.model.layout import to_device
from neounify.model.parts import GEN, UND, StreamName
from neounify.model.stream import Projected


class StaticDecoding:
    """One new token of up to `rows` sequences of a pool, each with up to `pages` blocks.

    `load` takes the sequences of a step; rows that are left over repeat the first one, and write
    the same keys to the same slot. `prepare` is the first thing of a recorded call.
    """

    def __init__(self, pool: PagedKVCache, rows: int, pages: int, kernel: Kernel | None) -> None:
        self._kernel = kernel if kernel is not None and kernel.pages else None
        self._pool, self._size, device = pool, pool.block_size, pool.keys.device
        self._keys, self._values = pool.keys.unbind(0), pool.values.unbind(0)
        pages_of = (pool.pages(memory) for memory in (pool.keys, pool.values))
        self._key_pages, self._value_pages = (x.unbind(0) for x in pages_of)
        self._tables = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        self._lengths = torch.ones(rows, dtype=torch.int32, device=device)
        self._new = torch.zeros(rows, dtype=torch.int64, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._places = torch.arange(pages * self._size, device=device)
        self._zero = torch.full((), pool.zero_slot, device=device)
        self._slots = self._mask = self._starts
        self._shape = rows, pages * self._size

    def load(self, sequences: Sequence[PagedSequence]) -> None:
        rows, pages = self._tables.shape
        tables = np.zeros((rows, pages), dtype=np.int32)
        lengths, new = np.ones(rows, dtype=np.int32), np.zeros(rows, dtype=np.int64)
        for row in range(rows):
            sequence = sequences[row if row < len(sequences) else 0]
            used = sequence.block_table[:pages]
            tables[row, : len(used)] = used
            lengths[row] = sequence.length + 1
            block, place = divmod(sequence.length, self._size)
            new[row] = used[block] * self._size + place
        device = self._tables.device
        for buffer, values in ((self._tables, tables), (self._lengths, lengths), (self._new, new)):
            buffer.copy_(to_device(values, device), non_blocking=True)

    def prepare(self) -> None:
        """Slots and mask of the gathered keys, the same for all layers."""
        if self._kernel is not None:
            return
        slots = (self._tables.long() * self._size).unsqueeze(2) + self._places[: self._size]
        real = self._places < self._lengths.unsqueeze(1)
        # What lies behind a sequence's end is masked, but a weight of 0 times NaN would be NaN.
        self._slots = torch.where(real, slots.flatten(1), self._zero).flatten()
        self._mask = real[:, None, None]

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[UND]
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._new, x.k)
        values.index_copy_(0, self._new, x.v)
        if self._kernel is None:
            return {UND: attend_slots(x.q, keys, values, self._slots, self._shape, self._mask)}
        attended = self._kernel.call(
            x.q,
            self._key_pages[layer],
            self._value_pages[layer],
            self._starts,
            None,
            1,
            self._places.shape[0],
            enable_gqa=x.q.shape[1] != x.k.shape[1],
            seqused_k=self._lengths,
            block_table=self._tables,
            num_splits=1,
        )
        return {UND: attended}


class StaticPrefixes:
    """`images` noisy images of `tokens` tokens each, behind prefixes of up to `room` tokens.

    `load` copies prefixes in; every call writes the images' keys behind them.
    """

    def __init__(
        self, images: int, tokens: int, room: int, like: SequenceCache, kernel: Kernel | None
    ) -> None:
        layers, heads, _, d = like.keys.shape
        self._kernel, self._tokens = kernel, tokens
        self._shape = images, room + tokens
        device = like.keys.device
        # Zero where nothing was written: a weight of 0 times NaN would be NaN.
        self._all_keys = like.keys.new_zeros(layers, images, room + tokens, heads, d)
        self._all_values = torch.zeros_like(self._all_keys)
        self._keys, self._values = (
            x.flatten(1, 2).unbind(0) for x in (self._all_keys, self._all_values)
        )
        self._lengths = torch.zeros(images, dtype=torch.int32, device=device)
        self._new = torch.zeros(images * tokens, dtype=torch.int64, device=device)
        self._mask = torch.zeros(images, 1, 1, room + tokens, dtype=torch.bool, device=device)
        starts = np.arange(images + 1, dtype=np.int32)
        self._query_starts = to_device(starts * tokens, device)
        self._key_starts = to_device(starts * (room + tokens), device)

    def load(self, caches: Sequence[SequenceCache]) -> None:
        """Copy the prefix of every image."""
        images, width = self._shape
        ends = np.array([cache.length for cache in caches])
        firsts = np.arange(images) * width + ends
        for memory, parts in (
            (self._all_keys, [cache.keys for cache in caches]),
            (self._all_values, [cache.values for cache in caches]),
        ):
            memory.zero_()
            for number, (part, end) in enumerate(zip(parts, ends.tolist(), strict=True)):
                memory[:, number, :end] = part[:, :, :end].transpose(1, 2)
        lengths = ends + self._tokens
        mask = (np.arange(width) < lengths[:, None])[:, None, None]
        new = (firsts[:, None] + np.arange(self._tokens)).reshape(-1)
        device = self._mask.device
        for buffer, values in (
            (self._lengths, lengths.astype(np.int32)),
            (self._new, new),
            (self._mask, mask),
        ):
            buffer.copy_(to_device(values, device), non_blocking=True)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[GEN]
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._new, x.k)
        values.index_copy_(0, self._new, x.v)
        if self._kernel is None:
            shape = self._shape
            k, v = (memory.unflatten(0, shape).transpose(1, 2) for memory in (keys, values))
            q = x.q.unflatten(0, (shape[0], self._tokens)).transpose(1, 2)
            return {GEN: masked_attention(q, k, v, self._mask).transpose(1, 2).flatten(0, 1)}
        attended = self._kernel.call(
            x.q,
            keys,
            values,
            self._query_starts,
            self._key_starts,
            self._tokens,
            self._shape[1],
            enable_gqa=x.q.shape[1] != x.k.shape[1],
            seqused_k=self._lengths,
        )
        return {GEN: attended}
