"""95 % intervals of differences between rates and of means, and tests of paired cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from neounify.data.sample import DataError
from neounify.evaluate.metrics import Floats, Rate, wilson_interval

DRAWS = 2000
"""Resamples of a bootstrap interval, and sign flips of a permutation test."""
_MAX_DRAWN = 2**22
"""Values drawn at once."""


@dataclass(frozen=True)
class Difference:
    """A difference of two rates and its 95 % interval, all from -1 to 1."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Value and interval as plain data."""
        return {name: round(getattr(self, name), 4) for name in ("value", "low", "high")}

    def __str__(self) -> str:
        value, low, high = (f"{100 * x:+.1f}" for x in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"


def newcombe(first: Rate, second: Rate) -> Difference:
    """first - second for two independent samples: Newcombe's interval (1998, method 10).

    The ends l and u of a Wilson interval are those true rates from which the seen rate p lies
    z standard errors away:

        p - l = z · sqrt(l (1 - l) / n),      u - p = z · sqrt(u (1 - u) / n)

    The difference d = p1 - p2 is lowest where the first true rate is l1 and the second u2. Its
    variance there is the sum of both, l1 (1 - l1) / n1 + u2 (1 - u2) / n2, and z² times that is
    (p1 - l1)² + (u2 - p2)² by the equations above; likewise at the upper end:

        low  = d - sqrt((p1 - l1)² + (u2 - p2)²)
        high = d + sqrt((u1 - p1)² + (p2 - l2)²)
    """
    return _squared_and_added(first, second, phi=0.0)


@dataclass(frozen=True)
class Paired:
    """The same cases under two conditions: how many were right under which."""

    both: int
    first_only: int
    second_only: int
    neither: int

    @staticmethod
    def of(first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """Count cases given in the same order. Raises DataError if they are no pairs."""
        if not first or len(first) != len(second):
            raise DataError(f"{len(first)} and {len(second)} cases are no pairs")
        pairs = list(zip(first, second, strict=True))
        table = ((True, True), (True, False), (False, True), (False, False))
        return Paired(*(pairs.count(kind) for kind in table))

    @property
    def number(self) -> int:
        """Cases, that is pairs."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def first(self) -> Rate:
        """The rate under the first condition."""
        return Rate(self.both + self.first_only, self.number)

    @property
    def second(self) -> Rate:
        """The rate under the second condition."""
        return Rate(self.both + self.second_only, self.number)

    @property
    def difference(self) -> Difference:
        """first - second: Newcombe's interval for paired rates (1998, method 10).

        As `newcombe`, but rates of the same cases vary together. Var(p1 - p2) loses
        2 φ sqrt(Var p1 · Var p2), so each sum of squares loses 2 φ times the product of its two
        distances. φ is the correlation of the fourfold table, taken half a case smaller where it
        is positive.
        """
        return _squared_and_added(self.first, self.second, self._phi())

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: are cases right in one condition only split evenly?"""
        changed = self.first_only + self.second_only
        fewer = min(self.first_only, self.second_only)
        tail = sum(math.comb(changed, k) for k in range(fewer + 1))
        return min(1.0, 2 * tail / 2**changed)

    def cells(self) -> list[object]:
        """What a table shows of the pairs: difference, changed cases, p value."""
        p = "< 0.001" if self.p_value < 0.001 else f"{self.p_value:.3f}"
        return [self.difference, self.first_only, self.second_only, p]

    def to_json(self) -> dict[str, object]:
        """Both rates, their difference, the counts of changed cases and the exact p value."""
        return {
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "difference": self.difference.to_json(),
            "first_only": self.first_only,
            "second_only": self.second_only,
            "p_value": round(self.p_value, 6),
        }

    def _phi(self) -> float:
        rows = (self.both + self.first_only) * (self.second_only + self.neither)
        columns = (self.both + self.second_only) * (self.first_only + self.neither)
        if rows * columns == 0:
            return 0.0
        excess = float(self.both * self.neither - self.first_only * self.second_only)
        if excess > 0:
            excess = max(0.0, excess - self.number / 2)
        return excess / math.sqrt(rows * columns)


@dataclass(frozen=True)
class Mean:
    """A mean of graded cases with its 95 % interval from the bootstrap over cases."""

    value: float
    low: float
    high: float
    number: int

    @staticmethod
    def of(values: Sequence[float], seed: int = 0) -> Mean:
        """The mean of finite values; the interval is between the 2.5 and 97.5 % quantiles of the
        means of `DRAWS` resamples. Raises DataError for no values."""
        numbers = np.asarray(values, np.float64)
        if not len(numbers) or not np.isfinite(numbers).all():
            raise DataError(f"{len(numbers)} values, not all finite, have no mean")
        low, high = np.quantile(_resampled_means(numbers, seed), [0.025, 0.975])
        return Mean(float(numbers.mean()), float(low), float(high), len(numbers))

    def to_json(self) -> dict[str, float | int]:
        """Mean, interval and number of cases."""
        value, low, high = (round(x, 4) for x in (self.value, self.low, self.high))
        return {"mean": value, "low": low, "high": high, "n": self.number}

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f}–{100 * self.high:.1f})"


@dataclass(frozen=True)
class PairedMeans:
    """The difference of two means of the same graded cases, and its p value."""

    difference: Difference
    p_value: float

    @staticmethod
    def of(first: Sequence[float], second: Sequence[float], seed: int = 0) -> PairedMeans:
        """first - second of cases in the same order. Raises DataError if they are no pairs.

        The interval is the bootstrap's over cases. p is the share of random signs of the cases'
        differences whose mean is at least as far from 0, the observed one counted among them.
        """
        if not len(first) or len(first) != len(second):
            raise DataError(f"{len(first)} and {len(second)} cases are no pairs")
        gains = np.asarray(first, np.float64) - np.asarray(second, np.float64)
        mean = Mean.of(gains.tolist(), seed)
        flipped = np.abs(_flipped_means(gains, seed))
        # Sums of the same numbers in another order differ in their last bits.
        beyond = int((flipped >= abs(mean.value) * (1 - 1e-9)).sum())
        difference = Difference(mean.value, mean.low, mean.high)
        return PairedMeans(difference, (beyond + 1) / (DRAWS + 1))


def _resampled_means(values: Floats, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    return _means(
        lambda rows: values[random.integers(len(values), size=(rows, len(values)))], len(values)
    )


def _flipped_means(gains: Floats, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    return _means(
        lambda rows: gains * random.choice([-1.0, 1.0], size=(rows, len(gains))), len(gains)
    )


def _means(draw: Callable[[int], Floats], number: int) -> Floats:
    """Means of `DRAWS` drawn rows of `number` values, in pieces that bound the memory."""
    rows = max(1, _MAX_DRAWN // number)
    pieces = [draw(min(rows, DRAWS - start)).mean(1) for start in range(0, DRAWS, rows)]
    return np.concatenate(pieces)


def _squared_and_added(first: Rate, second: Rate, phi: float) -> Difference:
    p1, p2 = first.value, second.value
    l1, u1 = wilson_interval(first.correct, first.number)
    l2, u2 = wilson_interval(second.correct, second.number)
    below = _length(p1 - l1, u2 - p2, phi)
    above = _length(u1 - p1, p2 - l2, phi)
    return Difference(p1 - p2, p1 - p2 - below, p1 - p2 + above)


def _length(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))
