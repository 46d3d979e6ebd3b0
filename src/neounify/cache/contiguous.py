"""The cache of one sequence: memory reserved once, tokens written behind one another."""

from __future__ import annotations

import torch
from torch import Tensor

from neounify.config import ModelConfig
from neounify.model.layout import Document, Span


class SequenceCache:
    """Keys and values of one sequence's understanding tokens, [layers, kv_heads, capacity, d].

    `length` tokens are complete; the next token stands at t = `next_t`. The model
    writes behind `length`; `advance` makes what was written part of the sequence.
    A denoising step only reads, so many steps may share one cache.
    """

    GROWTH = 256

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
