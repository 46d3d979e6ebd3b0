"""Reference-counted block allocator with prefix lookup; bookkeeping only, no tensors.

A block that no sequence uses but whose content has a hash stays cached until its memory is needed,
least recently used first, so that a later sequence with the same prefix need not compute it again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from neounify.errors import NeounifyError

BlockHash = bytes
"""Hash of a full block's content and of all blocks before it."""


class OutOfBlocks(NeounifyError):
    """The KV cache has too few free blocks for a sequence."""


class BlockAllocator:
    """`count` blocks, each free, idle (unused but cached) or in use by one or more sequences."""

    def __init__(self, count: int) -> None:
        self._users = [0] * count
        self._free = deque(range(count))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._hashes: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def count(self) -> int:
        return len(self._users)

    @property
    def available(self) -> int:
        """Blocks that could be allocated now."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        return self.count - self.available

    def used(self, block: int) -> bool:
        """Whether a sequence uses the block."""
        return self._users[block] > 0

    def match_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The cached blocks of the longest prefix of `hashes`."""
        matched: list[int] = []
        for content in hashes:
            block = self._blocks.get(content)
            if block is None:
                break
            matched.append(block)
        return matched

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to cached blocks."""
        for block in blocks:
            self._users[block] += 1
            self._idle.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for new content. Raises OutOfBlocks, having allocated none."""
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.available} of {self.count} are left")
        blocks = []
        for _ in range(count):
            block = self._free.popleft() if self._free else self._evict_oldest()
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, content: BlockHash) -> None:
        """Record the hash of a full block in use; of two blocks with one hash the first is kept."""
        if content not in self._blocks:
            self._blocks[content] = block
            self._hashes[block] = content

    def evict(self, blocks: Sequence[int]) -> None:
        """Remove the hashes of blocks, so that no further sequence shares their content."""
        for block in blocks:
            content = self._hashes.pop(block, None)
            if content is not None:
                del self._blocks[content]
                if block in self._idle:
                    del self._idle[block]
                    self._free.append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user. The ends of sequences are evicted before their beginnings."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._hashes:
                self._idle[block] = None
            else:
                self._free.append(block)

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Compare the counts with the block tables of all sequences. Raises ValueError."""
        users = [0] * self.count
        for table in tables:
            for block in table:
                users[block] += 1
        if users != self._users:
            wrong = [b for b in range(self.count) if users[b] != self._users[b]]
            counted = [self._users[b] for b in wrong]
            used = [users[b] for b in wrong]
            raise ValueError(f"blocks {wrong} are in {used} tables and counted in {counted}")
        unused = {block for block, number in enumerate(users) if not number}
        if unused != set(self._free) | set(self._idle) or set(self._free) & set(self._idle):
            raise ValueError(
                f"the unused blocks are {sorted(unused)}, each must be either free or idle; "
                f"free are {sorted(self._free)}, idle {sorted(self._idle)}"
            )
        if len(self._free) != len(set(self._free)):
            raise ValueError(f"a block is free twice: {sorted(self._free)}")
        if lacking := sorted(self._idle.keys() - self._hashes.keys()):
            raise ValueError(f"the idle blocks {lacking} have no hash")
        cached = {block: content for content, block in self._blocks.items()}
        if self._hashes != cached:
            differing = sorted(
                block
                for block in self._hashes.keys() | cached.keys()
                if self._hashes.get(block) != cached.get(block)
            )
            raise ValueError(f"hashes and cached blocks differ in blocks {differing}")

    def _evict_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._blocks[self._hashes.pop(block)]
        return block
