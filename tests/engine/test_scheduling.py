"""Scheduling of denoising steps: shortest remaining first, and no image waits for long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neounify.engine.generation import Waiting, preview_steps, select_images


def test_what_finishes_soonest_goes_first() -> None:
    waiting = [Waiting(4, 50), Waiting(4, 2), Waiting(4, 9)]
    assert select_images(waiting, max_rows=8, max_missed=9) == [1, 2]
    assert [w.missed for w in waiting] == [1, 0, 0]


def test_small_ones_fill_what_large_ones_leave() -> None:
    waiting = [Waiting(6, 1), Waiting(6, 2), Waiting(2, 30)]
    assert select_images(waiting, max_rows=8, max_missed=9) == [0, 2]


def test_one_larger_than_the_limit_goes_alone() -> None:
    assert select_images([Waiting(100, 5), Waiting(200, 9)], max_rows=8, max_missed=9) == [0]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 60),
    st.integers(1, 5),
)
def test_no_image_starves(sizes: list[tuple[int, int]], max_rows: int, max_missed: int) -> None:
    waiting = [Waiting(rows, steps) for rows, steps in sizes]
    for _ in range(200):
        chosen = select_images(waiting, max_rows, max_missed)
        assert chosen
        rows = sum(waiting[index].rows for index in chosen)
        assert rows <= max_rows or len(chosen) == 1
        # Each that is late is at most one turn of all others away.
        assert max(w.missed for w in waiting) <= max_missed + len(waiting)
        for index in chosen:
            # A finished one makes place for another of its kind.
            waiting[index].steps_left = waiting[index].steps_left - 1 or sizes[index][1]


@pytest.mark.parametrize(
    ("steps", "previews", "expected"),
    [(40, 3, {10, 20, 30}), (4, 3, {1, 2, 3}), (2, 3, {1}), (1, 3, set()), (10, 0, set())],
)
def test_previews_are_spread_evenly(steps: int, previews: int, expected: set[int]) -> None:
    assert preview_steps(steps, previews) == expected
