"""Caches of one sequence: their interface, and the contiguous one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from neounify.config import ModelConfig
from neounify.model.layout import Document, Span


class Cache(Protocol):
    """Keys and values of one sequence: `length` tokens, the next one stands at t = `next_t`."""

    length: int
    next_t: int

    def document(self, *spans: Span) -> Document:
        """New spans that continue this sequence."""

    def reserve(self, extra: int) -> None:
        """Make room for `extra` more tokens."""

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put the keys and values [N, kv_heads, d] of new tokens behind the others."""

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, length, d] of the first `length` tokens."""

    def advance(self, document: Document) -> None:
        """Count the document's tokens, now written in every layer."""


class SequenceCache:
    """Keys and values of one sequence's understanding tokens, [layers, kv_heads, capacity, d].

    `length` tokens are complete; the next token stands at t = `next_t`. The model
    writes behind `length`; `advance` makes what was written part of the sequence.
    A denoising step only reads, so many steps may share one cache. While several caches are
    decoded together, `keys` and `values` are row `row` of a `batch`.
    """

    GROWTH = 256
    batch: CacheBatch | None = None
    row: int = 0

    def __init__(
        self, config: ModelConfig, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.next_t = 0

    @classmethod
    def holding(cls, keys: Tensor, values: Tensor, next_t: int) -> SequenceCache:
        """A cache over given keys and values [layers, kv_heads, length, d], not copied."""
        cache = object.__new__(cls)
        cache.keys, cache.values = keys, values
        cache.length, cache.next_t = keys.shape[2], next_t
        return cache

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def document(self, *spans: Span) -> Document:
        """New spans that continue this sequence."""
        return Document(spans, past=self.length, start_t=self.next_t)

    def reserve(self, extra: int) -> None:
        """Make room for `extra` more tokens; grows by at least a quarter when it must move."""
        needed = self.length + extra
        if needed <= self.capacity:
            return
        capacity = max(needed, self.capacity + max(self.GROWTH, self.capacity // 4))
        self.keys = self._grown(self.keys, capacity)
        self.values = self._grown(self.values, capacity)
        self.batch = None

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        layers, heads, _, d = old.shape
        new = old.new_empty(layers, heads, capacity, d)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        stop = self.length + k.shape[0]
        self.keys[layer, :, self.length : stop] = k.transpose(0, 1)
        self.values[layer, :, self.length : stop] = v.transpose(0, 1)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer, :, :length], self.values[layer, :, :length]

    def advance(self, document: Document) -> None:
        """Count the document's understanding tokens, now written in every layer."""
        self.length += document.und_length()
        self.next_t = document.end_t

    def fork(self, extra: int = 0) -> SequenceCache:
        """An independent copy with room for `extra` more tokens: one prefix, two endings."""
        keys, values = (self._grown(x, self.length + extra) for x in (self.keys, self.values))
        copy = SequenceCache.holding(keys, values, self.next_t)
        copy.length = self.length
        return copy


class CacheBatch:
    """One memory of several caches, [layers, rows, kv_heads, capacity, d].

    Zero where nothing was written: a weight of 0 times NaN would be NaN.
    """

    ROOM = 64
    """Tokens of room at least behind the longest sequence of a new batch."""

    def __init__(self, caches: Sequence[SequenceCache], capacity: int) -> None:
        """Move caches into a new memory."""
        layers, heads, _, d = caches[0].keys.shape
        self.keys = caches[0].keys.new_zeros(layers, len(caches), heads, capacity, d)
        self.values = torch.zeros_like(self.keys)
        for row, cache in enumerate(caches):
            self.keys[:, row, :, : cache.length] = cache.keys[:, :, : cache.length]
            self.values[:, row, :, : cache.length] = cache.values[:, :, : cache.length]
            cache.keys, cache.values = self.keys[:, row], self.values[:, row]
            cache.batch, cache.row = self, row

    @classmethod
    def of(cls, caches: Sequence[SequenceCache], extra: int) -> CacheBatch:
        """The batch of these caches, with room for `extra` more tokens in each.

        A new one where they are in none, have no room, or would be few among the rows of ended
        sequences.
        """
        batch, longest = caches[0].batch, max(cache.length for cache in caches) + extra
        same = batch is not None and all(cache.batch is batch for cache in caches)
        if batch is not None and same:
            rows, capacity = batch.keys.shape[1], batch.keys.shape[3]
            if longest <= capacity and 2 * len(caches) > rows:
                return batch
        return cls(caches, longest + max(cls.ROOM, longest // 4))
