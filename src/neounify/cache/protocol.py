"""Interface of the cache of one sequence."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

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
