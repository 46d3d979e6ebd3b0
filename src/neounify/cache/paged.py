"""Keys and values of many sequences in one memory, cut into blocks that sequences may share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neounify.cache.blocks import BlockBook
from neounify.cache.content import Name, Row, block_name
from neounify.cache.protocol import Cache
from neounify.config import ModelConfig
from neounify.model.layout import Document, Span


class Padded(NamedTuple):
    """Keys and values of several sequences side by side, and which places hold some."""

    k: Float[Tensor, "b kv n d"]
    v: Float[Tensor, "b kv n d"]
    mask: Bool[Tensor, "b n"]


class PagedPool:
    """Memory for `blocks` · `block_size` tokens: keys and values [layers, tokens + 1, kv_heads, d].

    The last place is always zero. Padding reads it, so that nothing of one sequence, NaN least of
    all, gets into what another one computes.

    `open` gives a sequence room for what it will hold at first, `grow` more of it. What sequences
    have computed stays until its place is needed; a new one with the same beginning goes on from
    there.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        tokens = blocks * block_size + 1
        shape = (config.num_layers, tokens, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size
        self.book = BlockBook(blocks)
        self._living: dict[int, PagedSequence] = {}

    @property
    def zero_place(self) -> int:
        """The place that no sequence writes to."""
        return self.keys.shape[1] - 1

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def needed(self, rows: Sequence[Row], names: Sequence[Name] | None = None) -> int:
        """How many of the available blocks `open` would take for `rows`."""
        shared = sum(self.book.used(block) for block in self._reusable(rows, names))
        return self.blocks_for(len(rows)) - shared

    def open(
        self, rows: Sequence[Row], room: int, names: Sequence[Name] | None = None
    ) -> PagedSequence:
        """A sequence that will hold `rows` and up to `room` tokens after them.

        Its `length` says how many of the rows are there already; at least the last one is not, so
        that there is something to compute a prediction from. `names` are those of the rows, if
        they were computed before. Raises OutOfBlocks.
        """
        known = self._reusable(rows, names)
        self.book.share(known)
        table = list(known)
        try:
            table += self.book.take(self.blocks_for(len(rows) + room) - len(known))
            sequence = PagedSequence(self, table, rows[: len(known) * self.block_size])
        except BaseException:
            self.book.release(table)
            raise
        if len(known) * self.block_size < len(rows):
            sequence.next_t = rows[len(known) * self.block_size].t
        self._living[id(sequence)] = sequence
        return sequence

    def distrust(self, sequence: PagedSequence) -> None:
        """Let no other sequence begin with what this one holds."""
        self.book.forget(sequence.table)

    def close(self, sequence: PagedSequence) -> None:
        """Give up a sequence's room; closing it twice does nothing."""
        if self._living.pop(id(sequence), None) is not None:
            self.book.release(sequence.table)

    def names(self, rows: Sequence[Row]) -> list[Name]:
        """Of every full block of a sequence that begins with `rows`."""
        found: list[Name] = []
        for start in range(0, len(rows) - self.block_size + 1, self.block_size):
            before = found[-1] if found else b""
            found.append(block_name(before, rows[start : start + self.block_size]))
        return found

    def check(self) -> None:
        """Whether the books are right, and shared blocks named alike. Raises ValueError."""
        self.book.check([sequence.table for sequence in self._living.values()])
        for sequence in self._living.values():
            sequence.check()

    def _reusable(self, rows: Sequence[Row], names: Sequence[Name] | None = None) -> list[int]:
        names = self.names(rows) if names is None else names
        # The last row is always computed again.
        known = self.book.known_run(names[: max(0, len(rows) - 1) // self.block_size])
        while known and not rows[len(known) * self.block_size].starts:
            known.pop()
        return known


class PagedSequence:
    """One sequence of a pool; for the model and for `decode` it is like a `SequenceCache`.

    Whoever feeds it tells it the rows it will hold beforehand (`expect`).
    """

    def __init__(self, pool: PagedPool, table: list[int], rows: Sequence[Row]) -> None:
        self.pool, self.table = pool, table
        self.rows = list(rows)
        self.length = len(rows)
        self.next_t = 0
        self._names = pool.names(rows)
        self.places = self._places(table)

    @property
    def capacity(self) -> int:
        return self.places.shape[0]

    def document(self, *spans: Span) -> Document:
        """New spans that continue this sequence."""
        return Document(spans, past=self.length, start_t=self.next_t)

    def grow(self, blocks: int) -> None:
        """Take further blocks. Raises OutOfBlocks, having taken none."""
        taken = self.pool.book.take(blocks)
        self.table += taken
        self.places = torch.cat([self.places, self._places(taken)])

    def _places(self, blocks: Sequence[int]) -> Int[Tensor, " n"]:
        size, device = self.pool.block_size, self.pool.keys.device
        starts = torch.tensor(blocks, dtype=torch.int64).unsqueeze(1) * size
        return (starts + torch.arange(size)).flatten().to(device)

    def reserve(self, extra: int) -> None:
        """Raises ValueError when more is fed than there is room for."""
        if self.length + extra > self.capacity:
            raise ValueError(f"{self.length} + {extra} tokens in a room of {self.capacity}")

    def expect(self, rows: Sequence[Row]) -> None:
        """Say what the next tokens will be."""
        self.rows += rows

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        places = self.places[self.length : self.length + k.shape[0]]
        self.pool.keys[layer].index_copy_(0, places, k)
        self.pool.values[layer].index_copy_(0, places, v)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        places = self.places[:length]
        k = self.pool.keys[layer].index_select(0, places)
        v = self.pool.values[layer].index_select(0, places)
        return k.transpose(0, 1), v.transpose(0, 1)

    def advance(self, document: Document) -> None:
        """Count the document's tokens, now written in every layer; full blocks become known."""
        self.length += document.und_length()
        self.next_t = document.end_t
        size = self.pool.block_size
        while (len(self._names) + 1) * size <= min(self.length, len(self.rows)):
            number = len(self._names)
            rows = self.rows[number * size : (number + 1) * size]
            self._names.append(block_name(self._names[-1] if number else b"", rows))
            self.pool.book.name(self.table[number], self._names[-1])

    def gather(self) -> tuple[Tensor, Tensor]:
        """A copy of all keys and values, [layers, kv_heads, length, d]."""
        places = self.places[: self.length]
        k, v = (x.index_select(1, places) for x in (self.pool.keys, self.pool.values))
        return k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()

    def check(self) -> None:
        """Whether names and rows fit together. Raises ValueError."""
        if self._names != self.pool.names(self.rows[: self.length]):
            raise ValueError("a sequence's blocks are named wrongly")


class PagedBatch:
    """Sequences of one pool that take one token each: one gather serves all of them."""

    def __init__(self, sequences: Sequence[PagedSequence]) -> None:
        self._pool = sequences[0].pool
        device = self._pool.keys.device
        lengths = [sequence.length + 1 for sequence in sequences]
        longest = max(lengths)
        ends = [s.places[n - 1 : n] for s, n in zip(sequences, lengths, strict=True)]
        self._ends = torch.cat(ends)
        # What lies behind a sequence's end is masked, but a weight of 0 times NaN would be NaN.
        padded = torch.full((len(lengths), longest), self._pool.zero_place, device=device)
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            padded[row, :length] = sequence.places[:length]
        self._places = padded.flatten()
        self._mask = torch.arange(longest, device=device) < torch.tensor(
            lengths, device=device
        ).unsqueeze(1)

    def write_tokens(
        self, layer: int, k: Float[Tensor, "b kv d"], v: Float[Tensor, "b kv d"]
    ) -> None:
        """One new token of every sequence."""
        self._pool.keys[layer].index_copy_(0, self._ends, k)
        self._pool.values[layer].index_copy_(0, self._ends, v)

    def padded(self, layer: int) -> Padded:
        """Everything the new tokens see, themselves included."""
        k, v = (
            x[layer].index_select(0, self._places).unflatten(0, self._mask.shape).transpose(1, 2)
            for x in (self._pool.keys, self._pool.values)
        )
        return Padded(k, v, self._mask)


def together(caches: Sequence[Cache]) -> Sequence[Cache] | PagedBatch:
    """Caches as one batch where they are of one pool, else as they are."""
    paged = [cache for cache in caches if isinstance(cache, PagedSequence)]
    if len(paged) < 2 or len(paged) < len(caches) or len({id(c.pool) for c in paged}) > 1:
        return caches
    return PagedBatch(paged)
