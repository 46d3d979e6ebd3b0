"""Grouping of work into calls of bounded size."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def groups(items: Iterable[Item], rows: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Consecutive items whose `rows` add up to at most `limit`; a larger item stands alone."""
    group: list[Item] = []
    total = 0
    for item in items:
        new = rows(item)
        if group and total + new > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += new
    if group:
        yield group
