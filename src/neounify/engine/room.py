"""Memory of the KV caches: allocation, waiting and preemption of sequences.

`PagedRoom` bounds the memory. A sequence gets the blocks for what is to be prefilled when it
enters, and further ones as it grows. When none are left, it takes those of another: first of one
that no call waits for (its request is denoising, say), then of the youngest that is younger than
itself. A preempted sequence is prefilled again later. So the oldest always makes progress, and
every sequence becomes the oldest in the end. `ContiguousRoom` gives every sequence a separate cache
that grows as needed. Bookkeeping only: no tensors are touched.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from typing import Protocol

from neounify.cache import PagedKVCache, PagedSequence, SequenceCache
from neounify.engine.messages import Prefix
from neounify.engine.sequences import ServedSequence
from neounify.engine.tensors import LocalCache, Transport
from neounify.model.neo import NeoUnify

HEADROOM = 64
"""Free tokens required for a sequence that will decode to enter, so that it is not preempted at
once."""
MAX_PASSED = 32
"""Maximum number of younger sequences that enter before a waiting one."""


AHEAD = 64
"""Tokens a contiguous cache has room for beyond its prompt; it grows when more are written."""


class Room(Protocol):
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

    def leave(self, sequence: ServedSequence) -> None:
        """Release a sequence's cache, if it has one."""

    def invalidate(self, sequence: ServedSequence) -> None:
        """Exclude a sequence's blocks from prefix sharing."""

    def export(self, sequence: ServedSequence) -> Prefix:
        """A sequence's keys and values for the generation engine."""

    def check(self) -> None:
        """Check the bookkeeping. Raises ValueError."""


class ContiguousRoom:
    """A SequenceCache for every sequence, of the size it needs; exported without a copy.

    For callers without concurrent requests: nothing waits, nothing is preempted.
    """

    tokens = sys.maxsize
    used = 0.0

    def __init__(self, model: NeoUnify) -> None:
        self._model = model
        self.preempted = 0

    def allocated(self, tokens: int) -> int:
        return tokens

    def enter(
        self, lacking: Iterable[ServedSequence], wanted: Container[ServedSequence]
    ) -> list[ServedSequence]:
        entered = sorted(lacking, key=lambda s: s.age)
        model = self._model
        for sequence in entered:
            capacity = len(sequence.token_keys) + AHEAD
            sequence.cache = SequenceCache(
                model.config, capacity, dtype=model.compute_dtype, device=model.device
            )
            sequence.cached = 0
        return entered

    def grow(
        self, sequence: ServedSequence, tokens: int, wanted: Container[ServedSequence]
    ) -> bool:
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


class PagedRoom:
    """The blocks of a paged cache; exports are copies, so that they take none of them."""

    def __init__(self, pool: PagedKVCache, transport: Transport) -> None:
        self.pool, self.transport = pool, transport
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
        keys, values = cache.gather()
        return Prefix(self.transport.pack({"keys": keys, "values": values}), cache.next_t)

    def check(self) -> None:
        self.pool.check()

    def enter(
        self, lacking: Iterable[ServedSequence], wanted: Container[ServedSequence]
    ) -> list[ServedSequence]:
        """Allocate blocks, the oldest sequence first; returns the sequences that got them.

        A sequence without room is passed by at most MAX_PASSED younger ones. A failure is stored
        as the `error` of its sequence.
        """
        entered: list[ServedSequence] = []
        waiting: list[ServedSequence] = []
        for sequence in sorted(lacking, key=lambda s: s.age):
            if any(s.passed >= MAX_PASSED for s in waiting):
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
        """Room for `tokens` more behind what is in the cache; False if it has to wait."""
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

    def preempt(self, sequence: ServedSequence) -> None:
        """Take a sequence's blocks; their content can be matched until they are reused."""
        self.leave(sequence)
        self.preempted += 1

    def leave(self, sequence: ServedSequence) -> None:
        """Release a sequence's blocks, if it has any."""
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
            spare = self.pool.blocks_for(min(sequence.room, HEADROOM)) + decoding
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
