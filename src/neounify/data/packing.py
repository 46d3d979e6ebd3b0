"""Cost of a pack, and which documents share one.

Ranks meet after every pack, so all wait for the costliest. The time of a pack in rows is

    cost = rows + pairs / κ        κ = multiply-adds of a row in a layer / those of a pair

for the (query, key) pairs of attention; κ is `ModelConfig.pairs_per_row`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neounify.model.layout import Layout


def cost_of(layout: Layout, kappa: float) -> float:
    """The cost of a forward and backward pass over a layout, in rows."""
    return sum(rows + layout.pairs(name) / kappa for name, rows in layout.lengths.items())


@dataclass(frozen=True)
class Drawn:
    """Rows and cost of all documents that a data stream has drawn so far."""

    rows: int = 0
    cost: float = 0.0

    def plus(self, lengths: Sequence[int], costs: Sequence[float]) -> Drawn:
        return Drawn(self.rows + sum(lengths), self.cost + sum(costs))


def fill_packs(
    lengths: Sequence[int], costs: Sequence[float], capacity: int, drawn: Drawn
) -> list[list[int]]:
    """Put documents into packs of at most `capacity` rows and about equal cost; their numbers.

    First-fit decreasing by cost. A pack costs at most what `capacity` rows cost on average of all
    that was `drawn`, these documents too: the mean of few would differ from stream to stream.
    ValueError for a document over the capacity.
    """
    mean = drawn.cost / max(1, drawn.rows)
    return first_fit(lengths, costs, capacity, max(mean * capacity, *costs, 0.0))


def first_fit(
    lengths: Sequence[int], costs: Sequence[float], capacity: int, bound: float
) -> list[list[int]]:
    """Put items into the first bin that has room, the costliest first; the bins hold item numbers.

    A bin has at most `capacity` by length and `bound` by cost. Documents of like cost end up
    together, which also keeps padded attention short. ValueError for an item over a bound.
    """
    if max(lengths, default=0) > capacity or max(costs, default=0) > bound:
        raise ValueError(
            f"an item of {max(lengths)} tokens and cost {max(costs):.0f} does not fit a pack of "
            f"{capacity} and cost {bound:.0f}"
        )
    bins: list[list[int]] = []
    free: list[tuple[int, float]] = []
    shortest = min(lengths, default=0)
    cheapest = min(costs, default=0.0)
    first_open = 0
    for item in sorted(range(len(lengths)), key=lambda i: -costs[i]):
        length, cost = lengths[item], costs[item]
        while first_open < len(bins) and (
            free[first_open][0] < shortest or free[first_open][1] < cheapest
        ):
            first_open += 1
        for number in range(first_open, len(bins)):
            if length <= free[number][0] and cost <= free[number][1]:
                break
        else:
            number = len(bins)
            bins.append([])
            free.append((capacity, bound))
        bins[number].append(item)
        free[number] = (free[number][0] - length, free[number][1] - cost)
    return bins
