"""Who has room in the paged cache, who waits for it, and who has to give it up.

A sequence gets the blocks for what is to be read when it enters, and further ones as it grows.
When none are left, it takes those of another: first of one that nobody is waiting for (its
request is painting, say), then of the youngest that is younger than itself. What was given up is
read again later. So the oldest always goes on, whatever happens, and everybody becomes the oldest
in the end. Bookkeeping only: no tensors are touched.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from neounify.cache import PagedKVCache
from neounify.engine.sequences import ServedSequence

HEADROOM = 64
"""Tokens a sequence that will write should have room for when it enters, so that it does not have
to give way at once."""
MAX_PASSED = 32
"""A sequence that waits for room is passed by that many younger ones at most."""


class Room:
    """The blocks of a pool, given to the sequences that are `wanted`: somebody waits for them."""

    def __init__(self, pool: PagedKVCache) -> None:
        self.pool = pool
        self.preempted = 0
        self._inside: set[ServedSequence] = set()

    @property
    def tokens(self) -> int:
        """Of all blocks together."""
        return self.pool.allocator.count * self.pool.block_size

    def enter(
        self, lacking: Iterable[ServedSequence], wanted: Container[ServedSequence]
    ) -> list[ServedSequence]:
        """Let sequences in for which there is room, the oldest first; those that are.

        One that finds no room is passed by younger ones, but not for ever. What fails is the
        `error` of its sequence.
        """
        entered: list[ServedSequence] = []
        waiting: list[ServedSequence] = []
        for sequence in sorted(lacking, key=lambda s: s.order):
            if any(s.passed >= MAX_PASSED for s in waiting):
                break
            try:
                if not self._open(sequence, wanted):
                    waiting.append(sequence)
                    continue
            except Exception as error:  # whatever it is, it concerns this sequence alone
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
        assert sequence.cache is not None
        lacking = self.pool.blocks_for(sequence.cache.length + tokens) - len(
            sequence.cache.block_table
        )
        while self.pool.allocator.available < lacking:
            victim = self._victim(wanted, younger_than=sequence)
            if victim is None:
                return False
            self.preempt(victim)
        if lacking > 0:
            sequence.cache.grow(lacking)
        return True

    def preempt(self, sequence: ServedSequence) -> None:
        """Take a sequence's blocks; what they hold stays known until their place is needed."""
        self.leave(sequence)
        self.preempted += 1

    def leave(self, sequence: ServedSequence) -> None:
        """Give up a sequence's blocks, if it has any."""
        if sequence.cache is not None:
            self.pool.close(sequence.cache)
            sequence.cache = None
            self._inside.discard(sequence)

    def _open(self, sequence: ServedSequence, wanted: Container[ServedSequence]) -> bool:
        hashes = sequence.block_hashes(self.pool.block_size)
        needed = self.pool.blocks_needed(sequence.token_keys, hashes)
        spare, working = 0, [s for s in self._inside if s in wanted]
        if working:
            # Those that write will need a block each before long.
            writing = sum(s.text is not None or s.room > 0 for s in working)
            spare = self.pool.blocks_for(min(sequence.room, HEADROOM)) + writing
        idle = sum(len(s.cache.block_table) for s in self._inside if s.cache and s not in wanted)
        if needed + spare > self.pool.allocator.available + idle:
            return False
        while needed + spare > self.pool.allocator.available:
            victim = self._victim(wanted)
            if victim is None:
                return False
            self.preempt(victim)
            # What it shares with the victim is still there, but must be taken now.
            needed = self.pool.blocks_needed(sequence.token_keys, hashes)
        sequence.cache = self.pool.open(sequence.token_keys, 0, hashes)
        sequence.cache.expect(sequence.token_keys[sequence.cache.length :])
        if sequence.known is None:
            sequence.known = sequence.cache.length
        self._inside.add(sequence)
        return True

    def _victim(
        self,
        wanted: Container[ServedSequence],
        younger_than: ServedSequence | None = None,
    ) -> ServedSequence | None:
        idle = [s for s in self._inside if s not in wanted and s is not younger_than]
        if idle or younger_than is None:
            return max(idle, key=lambda s: s.order, default=None)
        younger = [s for s in self._inside if s.order > younger_than.order]
        return max(younger, key=lambda s: s.order, default=None)
