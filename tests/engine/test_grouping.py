"""Groups of bounded size: nothing lost, nothing reordered, none too large."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from neounify.engine.grouping import groups


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_groups(sizes: list[int], limit: int) -> None:
    cut = list(groups(sizes, lambda size: size, limit))
    assert [size for group in cut for size in group] == sizes
    assert all(group for group in cut)
    assert all(sum(group) <= limit or len(group) == 1 for group in cut)
    assert all(sum(a) + b[0] > limit for a, b in pairwise(cut))
