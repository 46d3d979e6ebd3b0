"""Sequences of the understanding engine, their pending calls, and the memory of their KV caches.

`PagedCaches` bounds the memory. A sequence gets the blocks for what is to be prefilled when it
enters, and further ones as it grows. When none are left, it takes those of another: first of one
that no call waits for (its request is denoising, say), then of the youngest that is younger than
itself. A preempted sequence is prefilled again later. So the oldest always makes progress, and
every sequence becomes the oldest in the end. `ContiguousCaches` gives every sequence a separate
cache that grows as needed. Nothing is computed here: caches are allocated, and copied for export.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from neounify.cache import Cache, PagedKVCache, PagedSequence, SequenceCache, new_cache
from neounify.cache.key_values import BlockHash, TokenKey, block_hashes, image_keys, text_keys
from neounify.config import Constraint
from neounify.decode.sampler import DecodeState
from neounify.engine.messages import (
    Appended,
    Decode,
    ImageInput,
    LocalCache,
    LocalTensors,
    Prefilled,
    Prefix,
    PromptInput,
    SequenceName,
    Transport,
)
from neounify.errors import ContextFullError
from neounify.model.layout import Grid, Image, Span, Text
from neounify.model.neo import NeoUnify
from neounify.runtime.plan import ExecutionPlan

# --- sequences ---


@dataclass(frozen=True)
class ModelInput:
    """New tokens of one sequence: `spans` in order, the ids of all text, the clean images.

    Images are ImageNet-normalised pixels [channels, height, width].
    """

    cache: Cache
    spans: tuple[Span, ...]
    ids: Sequence[int]
    images: Sequence[Tensor] = ()

    @classmethod
    def of(cls, cache: Cache, pieces: Sequence[Piece]) -> ModelInput:
        """Pieces in order behind what is in the cache."""
        return cls(
            cache,
            tuple(Text(len(p.ids)) if p.grid is None else Image.of(p.grid) for p in pieces),
            [token for piece in pieces for token in piece.ids],
            [piece.image for piece in pieces if piece.image is not None],
        )


@dataclass
class Piece:
    """Text, which may be prefilled in several steps, or an image, which is prefilled whole."""

    ids: list[int] = field(default_factory=list)
    image: Tensor | None = None
    grid: Grid | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids) if self.grid is None else self.grid.length


@dataclass(eq=False)
class ServedSequence:
    """A sequence: its content as `pieces` and `token_keys`, and its `cache` while it has one.

    `age` is its rank among all sequences, the oldest first. `hidden` is the state after `hidden_at`
    tokens; after preemption, all is prefilled again. `cached` are the tokens found in the cache
    when it was first opened, `room` the maximum number of tokens behind its prompt.
    """

    name: SequenceName
    age: int
    room: int
    pieces: list[Piece] = field(default_factory=list)
    token_keys: list[TokenKey] = field(default_factory=list)
    cache: PagedSequence | SequenceCache | None = None
    hidden: Tensor | None = None
    hidden_at: int = 0
    finite: bool = True
    cached: int | None = None
    passed: int = 0
    text: DecodeState | None = None
    error: Exception | None = None
    _block_hashes: list[BlockHash] = field(default_factory=list)

    @property
    def next_t(self) -> int:
        """Position of the next token."""
        return self.token_keys[-1].t + 1 if self.token_keys else 0

    @property
    def prefilled(self) -> bool:
        """Whether all of it has been prefilled, whether or not it is still in the cache."""
        return self.hidden_at == len(self.token_keys)

    @property
    def ready(self) -> bool:
        """Whether it is prefilled and all of it lies in the cache."""
        return (
            self.cache is not None and self.cache.length == len(self.token_keys) and self.prefilled
        )

    def block_hashes(self, block_size: int) -> list[BlockHash]:
        """Hashes of all full blocks."""
        self._block_hashes = block_hashes(self.token_keys, block_size, self._block_hashes)
        return self._block_hashes

    def append(self, parts: Sequence[PromptInput]) -> None:
        """Append text and images; images lie in LocalTensors."""
        keys = token_keys_of(parts, self.next_t)
        self.token_keys += keys
        self._expect(keys)
        for part in parts:
            if isinstance(part, ImageInput):
                assert isinstance(part.pixels, LocalTensors)
                self.pieces.append(Piece(image=part.pixels.tensors["pixels"], grid=part.grid))
            elif part.ids:
                self._append_text(part.ids)

    def append_token(self, token: int) -> None:
        """Append a decoded token."""
        keys = text_keys((token,), self.next_t)
        self.token_keys += keys
        self._expect(keys)
        self._append_text((token,))

    def _expect(self, keys: Sequence[TokenKey]) -> None:
        if isinstance(self.cache, PagedSequence):
            self.cache.expect(keys)

    def _append_text(self, ids: Sequence[int]) -> None:
        if not self.pieces or self.pieces[-1].image is not None:
            self.pieces.append(Piece())
        self.pieces[-1].ids += ids

    def next_pieces(self, max_tokens: int) -> list[Piece]:
        """Pieces to prefill next: at most `max_tokens` tokens, or one image that alone has more."""
        assert self.cache is not None
        left, batch = self.cache.length, list[Piece]()
        for piece in self.pieces:
            if left >= piece.tokens:
                left -= piece.tokens
                continue
            if piece.image is not None:
                if batch and piece.tokens > max_tokens:
                    break
                batch.append(piece)
            else:
                batch.append(Piece(ids=piece.ids[left : left + max_tokens]))
            left = 0
            max_tokens -= batch[-1].tokens
            if max_tokens <= 0:
                break
        return batch

    def model_input(self, pieces: Sequence[Piece]) -> ModelInput:
        """Pieces as the model's input."""
        assert self.cache is not None
        return ModelInput.of(self.cache, pieces)

    def take_state(self, hidden: Tensor, *, finite: bool) -> None:
        """Store the hidden state [hidden_size] after the last token in the cache."""
        assert self.cache is not None
        self.finite = self.finite and finite
        self.hidden, self.hidden_at = hidden, self.cache.length


# --- pending calls ---


@dataclass(eq=False)
class PendingPrefill:
    """A Prefill or Append call, answered once its sequences and `constraint` are ready."""

    call: int
    sequences: tuple[ServedSequence, ...]
    opens: bool
    then: Decode | None = None
    constraint: Future[Constraint] | None = None

    @property
    def answer(self) -> Prefilled | Appended:
        if not self.opens:
            return Appended()
        tokens = sum(len(s.token_keys) for s in self.sequences)
        return Prefilled(tokens, sum(s.cached or 0 for s in self.sequences))


@dataclass(eq=False)
class PendingExport:
    """An Export call; preempted sequences are prefilled again first."""

    call: int
    sequences: tuple[ServedSequence, ...]
    done: dict[SequenceName, Prefix] = field(default_factory=dict)

    @property
    def left(self) -> list[ServedSequence]:
        return [s for s in self.sequences if s.name not in self.done]

    def free(self) -> None:
        """Free the copies so far."""
        for prefix in self.done.values():
            prefix.ref.free()


# --- lengths ---


def token_keys_of(parts: Sequence[PromptInput], t: int) -> list[TokenKey]:
    """Keys of parts that begin at position `t`."""
    keys: list[TokenKey] = []
    for part in parts:
        if isinstance(part, ImageInput):
            keys += image_keys(part.digest, part.tokens, t)
            t += 1
        else:
            keys += text_keys(part.ids, t)
            t += part.tokens
    return keys


def tokens_of(parts: Sequence[PromptInput]) -> int:
    """Tokens of the understanding stream."""
    return sum(part.tokens for part in parts)


def positions_of(parts: Sequence[PromptInput]) -> int:
    """Positions that parts take; an image takes one."""
    return sum(1 if isinstance(part, ImageInput) else part.tokens for part in parts)


def check_context(end: int, limit: int) -> None:
    """ContextFullError unless a sequence that ends at position `end` fits the context."""
    if end > limit:
        raise ContextFullError(
            f"the sequence would be {end} positions long, the model reads {limit}"
        )


# --- memory ---


class KVCacheManager(Protocol):
    """Allocator of KV caches; sequences with a pending call are `wanted`."""

    preempted: int
    """Sequences preempted since the start."""

    @property
    def tokens(self) -> int:
        """Maximum tokens of one sequence."""

    def allocated(self, tokens: int) -> int:
        """Tokens allocated for a sequence of `tokens`, in whole blocks."""

    @property
    def used(self) -> float:
        """Share of the memory in use, 0 to 1."""

    def enter(
        self, lacking: Iterable[ServedSequence], wanted: Container[ServedSequence]
    ) -> list[ServedSequence]:
        """Allocate caches, the oldest sequence first; returns the sequences that got one."""

    def grow(
        self, sequence: ServedSequence, tokens: int, wanted: Container[ServedSequence]
    ) -> bool:
        """Room for `tokens` more behind what is in the cache; False if it has to wait."""

    def fits(self, sequence: ServedSequence) -> bool:
        """Whether a sequence is in the cache, or could be without preempting others."""

    def leave(self, sequence: ServedSequence) -> None:
        """Release a sequence's cache, if it has one."""

    def invalidate(self, sequence: ServedSequence) -> None:
        """Exclude a sequence's blocks from prefix sharing."""

    def export(self, sequence: ServedSequence) -> Prefix:
        """A sequence's keys and values for the generation engine."""

    def check(self) -> None:
        """Check the bookkeeping. Raises ValueError."""


class ContiguousCaches:
    """A SequenceCache for every sequence, of the size it needs; exported without a copy.

    For callers without concurrent requests: nothing waits, nothing is preempted.
    """

    tokens = sys.maxsize
    used = 0.0

    def __init__(self, model: NeoUnify, *, reserve: int = ExecutionPlan.kv_reserve) -> None:
        """`reserve` are the tokens a cache has room for beyond its prompt."""
        self._model, self._reserve = model, reserve
        self.preempted = 0

    def allocated(self, tokens: int) -> int:
        return tokens

    def enter(
        self, lacking: Iterable[ServedSequence], wanted: Container[ServedSequence]
    ) -> list[ServedSequence]:
        entered = list[ServedSequence]()
        for sequence in sorted(lacking, key=lambda s: s.age):
            capacity = len(sequence.token_keys) + self._reserve
            try:
                sequence.cache = new_cache(self._model, capacity)
            except Exception as error:  # any error concerns this sequence alone
                sequence.error = error
                continue
            sequence.cached = 0
            entered.append(sequence)
        return entered

    def grow(
        self, sequence: ServedSequence, tokens: int, wanted: Container[ServedSequence]
    ) -> bool:
        return True

    def fits(self, sequence: ServedSequence) -> bool:
        return True

    def leave(self, sequence: ServedSequence) -> None:
        sequence.cache = None

    def invalidate(self, sequence: ServedSequence) -> None:
        """Nothing is shared."""

    def export(self, sequence: ServedSequence) -> Prefix:
        assert isinstance(sequence.cache, SequenceCache)
        return Prefix(LocalCache(sequence.cache), sequence.cache.next_t)

    def check(self) -> None:
        """There is no bookkeeping."""


class PagedCaches:
    """The blocks of a paged cache; exports are copies, so that they take none of them."""

    def __init__(
        self,
        pool: PagedKVCache,
        transport: Transport,
        *,
        headroom: int = ExecutionPlan.kv_headroom,
        max_passed: int = ExecutionPlan.max_passed,
    ) -> None:
        """Limits are as in ExecutionPlan: `headroom` is its `kv_headroom`."""
        self.pool, self.transport = pool, transport
        self._headroom, self._max_passed = headroom, max_passed
        self.preempted = 0
        self._inside: set[ServedSequence] = set()

    @property
    def tokens(self) -> int:
        """Tokens of all blocks together."""
        return self.pool.allocator.count * self.pool.block_size

    def allocated(self, tokens: int) -> int:
        return self.pool.blocks_for(tokens) * self.pool.block_size

    @property
    def used(self) -> float:
        return self.pool.allocator.in_use / self.pool.allocator.count

    def invalidate(self, sequence: ServedSequence) -> None:
        if isinstance(sequence.cache, PagedSequence):
            self.pool.invalidate(sequence.cache)

    def export(self, sequence: ServedSequence) -> Prefix:
        cache = _paged(sequence)
        return Prefix(self.transport.pack_heads(*cache.gather()), cache.next_t)

    def check(self) -> None:
        self.pool.check()

    def enter(
        self, lacking: Iterable[ServedSequence], wanted: Container[ServedSequence]
    ) -> list[ServedSequence]:
        """Allocate blocks, the oldest sequence first; returns the sequences that got them.

        A sequence without room is passed by at most `max_passed` younger ones. A failure is stored
        as the `error` of its sequence.
        """
        entered: list[ServedSequence] = []
        waiting: list[ServedSequence] = []
        for sequence in sorted(lacking, key=lambda s: s.age):
            if any(s.passed >= self._max_passed for s in waiting):
                break
            try:
                if not self._open(sequence, wanted):
                    waiting.append(sequence)
                    continue
            except Exception as error:  # any error concerns this sequence alone
                self.leave(sequence)
                sequence.error = error
                continue
            for passed in waiting:
                passed.passed += 1
            sequence.passed = 0
            entered.append(sequence)
        return entered

    def grow(
        self, sequence: ServedSequence, tokens: int, wanted: Container[ServedSequence]
    ) -> bool:
        cache = _paged(sequence)
        lacking = self.pool.blocks_for(cache.length + tokens) - len(cache.block_table)
        while self.pool.allocator.available < lacking:
            victim = self._victim(wanted, younger_than=sequence)
            if victim is None:
                return False
            self.preempt(victim)
        if lacking > 0:
            cache.grow(lacking)
        return True

    def fits(self, sequence: ServedSequence) -> bool:
        if sequence.cache is not None:
            return True
        hashes = sequence.block_hashes(self.pool.block_size)
        needed = self.pool.blocks_needed(sequence.token_keys, hashes)
        return needed <= self.pool.allocator.available

    def preempt(self, sequence: ServedSequence) -> None:
        """Take a sequence's blocks; their content can be matched until they are reused."""
        self.leave(sequence)
        self.preempted += 1

    def leave(self, sequence: ServedSequence) -> None:
        if sequence.cache is not None:
            self.pool.close(_paged(sequence))
            sequence.cache = None
            self._inside.discard(sequence)

    def _open(self, sequence: ServedSequence, wanted: Container[ServedSequence]) -> bool:
        hashes = sequence.block_hashes(self.pool.block_size)
        needed = self.pool.blocks_needed(sequence.token_keys, hashes)
        spare, working = 0, [s for s in self._inside if s in wanted]
        if working:
            # Each decoding sequence will soon need another block.
            decoding = sum(s.text is not None or s.room > 0 for s in working)
            spare = self.pool.blocks_for(min(sequence.room, self._headroom)) + decoding
        idle = sum(len(_paged(s).block_table) for s in self._inside if s not in wanted)
        if needed + spare > self.pool.allocator.available + idle:
            return False
        while needed + spare > self.pool.allocator.available:
            victim = self._victim(wanted)
            if victim is None:
                return False
            self.preempt(victim)
            # What it shares with the victim is still there, but must be taken now.
            needed = self.pool.blocks_needed(sequence.token_keys, hashes)
        cache = sequence.cache = self.pool.open(sequence.token_keys, 0, hashes)
        cache.expect(sequence.token_keys[cache.length :])
        if sequence.cached is None:
            sequence.cached = cache.length
        self._inside.add(sequence)
        return True

    def _victim(
        self,
        wanted: Container[ServedSequence],
        younger_than: ServedSequence | None = None,
    ) -> ServedSequence | None:
        idle = [s for s in self._inside if s not in wanted and s is not younger_than]
        if idle or younger_than is None:
            return max(idle, key=lambda s: s.age, default=None)
        younger = [s for s in self._inside if s.age > younger_than.age]
        return max(younger, key=lambda s: s.age, default=None)


def _paged(sequence: ServedSequence) -> PagedSequence:
    assert isinstance(sequence.cache, PagedSequence)
    return sequence.cache
