"""Who uses which block of a paged cache, and what the blocks are known to hold.

Bookkeeping only, no tensors. A block that no sequence uses but whose content has a name stays
known until its place is needed, the longest unused first, so that a later sequence with the same
beginning need not compute it again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from neounify.errors import NeounifyError


class OutOfBlocks(NeounifyError):
    """The cache has no room left for a sequence."""


class BlockBook:
    """`count` blocks, each free, idle (unused but known) or in use by one or more sequences."""

    def __init__(self, count: int) -> None:
        self._users = [0] * count
        self._free = deque(range(count))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}

    @property
    def count(self) -> int:
        return len(self._users)

    @property
    def available(self) -> int:
        """Blocks that could be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        return self.count - self.available

    def used(self, block: int) -> bool:
        """Whether a sequence uses the block."""
        return self._users[block] > 0

    def known_run(self, names: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of `names`."""
        found: list[int] = []
        for name in names:
            block = self._known.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to known blocks."""
        for block in blocks:
            self._users[block] += 1
            self._idle.pop(block, None)

    def take(self, count: int) -> list[int]:
        """`count` blocks for new content. Raises OutOfBlocks, having taken none."""
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.available} of {self.count} are left")
        taken = []
        for _ in range(count):
            block = self._free.popleft() if self._free else self._forget_oldest()
            self._users[block] = 1
            taken.append(block)
        return taken

    def name(self, block: int, name: bytes) -> None:
        """Say what a full block in use holds; the first of two with one name stays known."""
        if name not in self._known:
            self._known[name] = block
            self._names[block] = name

    def forget(self, blocks: Sequence[int]) -> None:
        """Take the names of blocks away, so that no further sequence uses their content."""
        for block in blocks:
            name = self._names.pop(block, None)
            if name is not None:
                del self._known[name]
                if block in self._idle:
                    del self._idle[block]
                    self._free.append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Take a user away. The ends of sequences are forgotten before their beginnings."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._names:
                self._idle[block] = None
            else:
                self._free.append(block)

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Compare the books with the tables of all living sequences. Raises ValueError."""
        users = [0] * self.count
        for table in tables:
            for block in table:
                users[block] += 1
        if users != self._users:
            wrong = [b for b in range(self.count) if users[b] != self._users[b]]
            raise ValueError(f"blocks {wrong} are counted wrongly")
        unused = {block for block, number in enumerate(users) if not number}
        if unused != set(self._free) | set(self._idle) or set(self._free) & set(self._idle):
            raise ValueError("the free and idle blocks are not the unused ones")
        if len(self._free) != len(set(self._free)):
            raise ValueError("a block is free twice")
        if any(block not in self._names for block in self._idle):
            raise ValueError("an idle block has no name")
        if self._names != {block: name for name, block in self._known.items()}:
            raise ValueError("names and known blocks differ")

    def _forget_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._known[self._names.pop(block)]
        return block
