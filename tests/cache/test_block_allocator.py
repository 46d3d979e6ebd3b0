"""The books of a paged cache: nothing is lost, nothing is given twice, what is known is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neounify.cache.block_allocator import BlockAllocator, OutOfBlocks


def test_a_known_block_is_found_until_its_place_is_needed() -> None:
    allocator = BlockAllocator(3)
    a, b = allocator.allocate(2)
    allocator.register(a, b"a")
    allocator.register(b, b"b")
    allocator.release([a, b])
    assert allocator.available == 3
    assert allocator.match_prefix([b"a", b"b", b"c"]) == [a, b]
    allocator.allocate(1)  # the free one
    assert allocator.match_prefix([b"a", b"b"]) == [a, b]
    allocator.allocate(1)  # the end of the sequence is forgotten before its beginning
    assert allocator.match_prefix([b"a", b"b"]) == [a]


def test_a_block_in_use_is_never_given_away() -> None:
    allocator = BlockAllocator(2)
    (a,) = allocator.allocate(1)
    allocator.register(a, b"a")
    allocator.share([a])
    allocator.release([a])
    assert allocator.allocate(1) != [a]
    with pytest.raises(OutOfBlocks, match="1 blocks wanted, 0 of 2 are left"):
        allocator.allocate(1)
    allocator.check([[a], [1 - a]])


def test_wrong_books_are_noticed() -> None:
    allocator = BlockAllocator(2)
    (a,) = allocator.allocate(1)
    with pytest.raises(ValueError, match=r"in \[0\] tables and counted in \[1\]"):
        allocator.check([])
    allocator.check([[a]])
    allocator._free.append(a)
    with pytest.raises(ValueError, match="either free or idle"):
        allocator.check([[a]])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=60))
def test_any_history_keeps_the_books(history: list[tuple[int, int]]) -> None:
    allocator = BlockAllocator(8)
    tables: list[list[int]] = []
    for action, number in history:
        if action == 0 and number <= allocator.available:
            tables.append(allocator.allocate(number))
        elif action == 1 and tables:
            allocator.release(tables.pop(number % len(tables)))
        elif action == 2 and tables:
            for block in tables[number % len(tables)]:
                allocator.register(block, b"%d" % (block % 5))
        elif action == 3:
            matched = allocator.match_prefix([b"%d" % n for n in range(number % 5)])
            allocator.share(matched)
            tables.append(matched)
        elif action == 4:
            allocator.evict(allocator.match_prefix([b"%d" % n for n in range(number % 5)])[-1:])
            allocator.evict(tables[number % len(tables)] if tables else [])
        allocator.check(tables)
        assert allocator.in_use == len({block for table in tables for block in table})
