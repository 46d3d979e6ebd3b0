"""Intervals of differences against published values, and against what must hold by symmetry."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from neounify.data.sample import DataError
from neounify.evaluate.intervals import Mean, Paired, PairedMeans, newcombe
from neounify.scenes.bench import Rate, wilson_interval

# Newcombe (1998), "Interval estimation for the difference between independent proportions",
# table II, method 10.
PUBLISHED = [
    ((56, 70), (48, 80), 0.0524, 0.3339),
    ((9, 10), (3, 10), 0.1705, 0.8090),
    ((6, 7), (2, 7), 0.0582, 0.8062),
    ((5, 56), (0, 29), -0.0381, 0.1926),
    ((0, 10), (0, 20), -0.1611, 0.2775),
    ((10, 10), (0, 10), 0.6075, 1.0000),
]


@pytest.mark.parametrize(("first", "second", "low", "high"), PUBLISHED)
def test_independent_rates_as_published(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    interval = newcombe(Rate(*first), Rate(*second))
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    back = newcombe(Rate(*second), Rate(*first))
    assert (back.value, back.low, back.high) == (-interval.value, -interval.high, -interval.low)


def test_pairs_are_counted_in_order() -> None:
    pairs = Paired.of([True, True, False, False, True], [True, False, True, False, False])
    assert pairs == Paired(both=1, first_only=2, second_only=1, neither=1)
    assert (pairs.first, pairs.second, pairs.number) == (Rate(3, 5), Rate(2, 5), 5)
    with pytest.raises(DataError):
        Paired.of([True], [])


def test_pairs_without_correlation_are_as_independent() -> None:
    # both · neither = first_only · second_only, so φ is 0.
    pairs = Paired(both=20, first_only=40, second_only=10, neither=20)
    assert pairs.difference == newcombe(pairs.first, pairs.second)


def test_pairs_that_agree_have_a_narrower_interval_and_that_disagree_a_wider_one() -> None:
    alike = Paired(both=45, first_only=10, second_only=5, neither=40)
    unlike = Paired(both=5, first_only=50, second_only=45, neither=0)
    for pairs, narrower in ((alike, True), (unlike, False)):
        paired, apart = pairs.difference, newcombe(pairs.first, pairs.second)
        assert paired.value == pytest.approx(0.05)
        assert (paired.high - paired.low < apart.high - apart.low) == narrower


def test_the_paired_interval_is_near_the_bootstraps() -> None:
    pairs = Paired(both=90, first_only=50, second_only=20, neither=40)
    shares = [pairs.both, pairs.first_only, pairs.second_only, pairs.neither]
    draws = np.random.default_rng(0).multinomial(200, [s / 200 for s in shares], 20_000)
    low, high = np.quantile((draws[:, 1] - draws[:, 2]) / 200, [0.025, 0.975])
    assert pairs.difference.low == pytest.approx(low, abs=0.012)
    assert pairs.difference.high == pytest.approx(high, abs=0.012)


def test_pairs_that_never_change_still_have_an_interval() -> None:
    pairs = Paired(both=8, first_only=0, second_only=0, neither=0)
    low, high = wilson_interval(8, 8)
    assert pairs.difference.value == 0
    assert pairs.difference.high == pytest.approx(high - low)
    assert pairs.p_value == 1


def test_mcnemars_exact_p_value() -> None:
    def p(first_only: int, second_only: int) -> float:
        return Paired(7, first_only, second_only, 3).p_value

    assert p(5, 0) == p(0, 5) == 2 / 2**5
    assert p(6, 6) == 1
    assert p(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    assert math.isclose(p(2, 9), 2 * (1 + 11 + 55) / 2**11)


def test_a_difference_is_in_points() -> None:
    assert str(newcombe(Rate(56, 70), Rate(48, 80))) == "+20.0 (+5.2 to +33.4)"


def test_the_interval_of_a_mean_is_that_of_the_normal_for_many_cases() -> None:
    values = np.random.default_rng(3).random(2000)
    mean = Mean.of(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert mean.value == pytest.approx(values.mean())
    assert (mean.low, mean.high) == pytest.approx((mean.value - half, mean.value + half), abs=0.002)
    assert Mean.of(values.tolist()) == mean, "the same draws every time"
    assert Mean.of([0.25]) == Mean(0.25, 0.25, 0.25, 1)
    assert mean.to_json().keys() == {"mean", "low", "high", "n"}


@pytest.mark.parametrize("values", [[], [0.5, math.nan]])
def test_values_without_a_mean(values: list[float]) -> None:
    with pytest.raises(DataError, match=f"{len(values)} values"):
        Mean.of(values)


def test_graded_pairs_find_a_difference_that_each_case_has() -> None:
    second = np.random.default_rng(1).random(40)
    pairs = PairedMeans.of((second + 0.02).tolist(), second.tolist())
    assert pairs.difference.value == pytest.approx(0.02)
    assert 0 < pairs.difference.low <= pairs.difference.high
    assert pairs.p_value == pytest.approx(1 / 2001)


def test_graded_pairs_find_no_difference_between_draws_of_one_kind() -> None:
    values = np.random.default_rng(2).random((200, 2, 30))
    p_values = np.array([PairedMeans.of(a.tolist(), b.tolist()).p_value for a, b in values])
    assert 0.01 <= (p_values < 0.05).mean() <= 0.1
    assert PairedMeans.of([0.5, 0.5], [0.5, 0.5]).p_value == 1


def test_cases_that_are_no_pairs() -> None:
    with pytest.raises(DataError, match="2 and 1 cases"):
        PairedMeans.of([0.0, 1.0], [1.0])


def test_the_ends_of_wilsons_interval_solve_its_equation() -> None:
    """|p - end| = z sqrt(end (1 - end) / n), with z of scipy.stats.norm.ppf(0.975)."""
    for correct, number in ((0, 5), (1, 5), (37, 200), (199, 200), (200, 200)):
        for end in wilson_interval(correct, number):
            distance = abs(correct / number - end)
            error = 1.959963984540054 * math.sqrt(end * (1 - end) / number)
            assert distance == pytest.approx(error, abs=1e-12)


def test_the_bootstrap_of_right_and_wrong_is_the_binomials() -> None:
    """Resampled means of k ones in n are Binomial(n, k / n) / n, whose quantiles are sums."""
    number, ones = 50, 15
    mean = Mean.of([1.0] * ones + [0.0] * (number - ones))
    share = ones / number
    terms = [
        math.comb(number, k) * share**k * (1 - share) ** (number - k) for k in range(number + 1)
    ]
    below = np.cumsum(terms)
    low, high = (int(np.searchsorted(below, q)) / number for q in (0.025, 0.975))
    assert (mean.low, mean.high) == pytest.approx((low, high), abs=1.01 / number)


def test_the_permutation_test_is_near_the_one_of_all_signs() -> None:
    gains = np.array([0.3, 0.1, 0.25, -0.05, 0.2, 0.15, -0.1, 0.05, 0.2, 0.12])
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=len(gains))))
    exact = (np.abs(signs @ gains) >= abs(gains.sum()) - 1e-12).mean()
    drawn = PairedMeans.of(gains.tolist(), [0.0] * len(gains)).p_value
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 2000))
    # Gains of one size: all signs are a binomial, as in McNemar's test.
    pairs = Paired(both=3, first_only=8, second_only=2, neither=7)
    first, second = [1.0] * 11 + [0.0] * 9, [1.0] * 3 + [0.0] * 8 + [1.0] * 2 + [0.0] * 7
    drawn, exact = PairedMeans.of(first, second).p_value, pairs.p_value
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 2000))
