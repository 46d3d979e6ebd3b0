"""The books of a paged cache: nothing is lost, nothing is given twice, what is known is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neounify.cache.blocks import BlockBook, OutOfBlocks


def test_a_known_block_is_found_until_its_place_is_needed() -> None:
    book = BlockBook(3)
    a, b = book.take(2)
    book.name(a, b"a")
    book.name(b, b"b")
    book.release([a, b])
    assert book.available == 3
    assert book.known_run([b"a", b"b", b"c"]) == [a, b]
    book.take(1)  # the free one
    assert book.known_run([b"a", b"b"]) == [a, b]
    book.take(1)  # the end of the sequence is forgotten before its beginning
    assert book.known_run([b"a", b"b"]) == [a]


def test_a_block_in_use_is_never_given_away() -> None:
    book = BlockBook(2)
    (a,) = book.take(1)
    book.name(a, b"a")
    book.share([a])
    book.release([a])
    assert book.take(1) != [a]
    with pytest.raises(OutOfBlocks, match="1 blocks wanted, 0 of 2 are left"):
        book.take(1)
    book.check([[a], [1 - a]])


def test_wrong_books_are_noticed() -> None:
    book = BlockBook(2)
    (a,) = book.take(1)
    with pytest.raises(ValueError, match="counted wrongly"):
        book.check([])
    book.check([[a]])
    book._free.append(a)
    with pytest.raises(ValueError, match="not the unused ones"):
        book.check([[a]])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=60))
def test_any_history_keeps_the_books(history: list[tuple[int, int]]) -> None:
    book = BlockBook(8)
    tables: list[list[int]] = []
    for action, number in history:
        if action == 0 and number <= book.available:
            tables.append(book.take(number))
        elif action == 1 and tables:
            book.release(tables.pop(number % len(tables)))
        elif action == 2 and tables:
            for block in tables[number % len(tables)]:
                book.name(block, b"%d" % (block % 5))
        elif action == 3:
            found = book.known_run([b"%d" % n for n in range(number % 5)])
            book.share(found)
            tables.append(found)
        elif action == 4:
            book.forget(book.known_run([b"%d" % n for n in range(number % 5)])[-1:])
            book.forget(tables[number % len(tables)] if tables else [])
        book.check(tables)
        assert book.in_use == len({block for table in tables for block in table})
