"""One or more sources, drawn by weight, with no state: draw i is a function of (seed, i)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from neounify.data.sample import DataError, Sample
from neounify.data.source import Source

BLOCK = 1024
"""Draws that hold every source in exact proportion."""


class Mixture:
    """Draws come in blocks of `BLOCK`; each holds every source as often as its weight says.

    The n-th draw of a finite source is sample permutation(epoch)[n mod size]: every epoch takes
    each sample once, in an order of its own. Draws of a source without end are its samples in
    order. Raises DataError for wrong weights.
    """

    size = None

    def __init__(self, parts: Sequence[tuple[Source, float]], seed: int) -> None:
        weights = [weight for _, weight in parts]
        if not parts or not all(0 < weight < float("inf") for weight in weights):
            raise DataError(f"a mixture needs sources with weights above 0, got {weights}")
        if len(parts) > BLOCK // 2:
            raise DataError(f"{len(parts)} sources are more than a block of {BLOCK} can hold")
        self.sources = [source for source, _ in parts]
        self.seed = seed
        self.counts = _shares(weights)
        self._order = lru_cache(maxsize=4)(self._block)
        self._epochs = lru_cache(maxsize=8)(self._permutation)

    def __getitem__(self, index: int) -> Sample:
        source, number = self.describe(index)
        return self.sources[source][number]

    def describe(self, index: int) -> tuple[int, int]:
        """(source, sample in it) that a draw takes."""
        if index < 0:
            raise DataError(f"sample {index}: a mixture has no last sample")
        block, place = divmod(index, BLOCK)
        order = self._order(block)
        source = int(order[place])
        nth = block * self.counts[source] + int((order[:place] == source).sum())
        size = self.sources[source].size
        if size is None:
            return source, nth
        epoch, place = divmod(nth, size)
        return source, int(self._epochs(source, epoch)[place])

    def _block(self, block: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, 0, block))
        return rng.permutation(np.repeat(np.arange(len(self.counts)), self.counts))

    def _permutation(self, source: int, epoch: int) -> NDArray[np.int64]:
        size = self.sources[source].size
        assert size is not None
        return np.random.default_rng((self.seed, 1, source, epoch)).permutation(size)

    def __getstate__(self) -> dict[str, object]:
        return {"sources": self.sources, "seed": self.seed, "counts": self.counts}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=4)(self._block)
        self._epochs = lru_cache(maxsize=8)(self._permutation)


def _shares(weights: Sequence[float]) -> list[int]:
    """Draws of a block per source: at least 1, the rest by largest remainder."""
    exact = np.array(weights) / sum(weights) * (BLOCK - len(weights)) + 1
    counts = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
        counts[place] += 1
    return [int(count) for count in counts]
