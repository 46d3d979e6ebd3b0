"""Choosing tokens, against a plain implementation with loops."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neounify.decode import SamplingSettings, greedy, make_chooser
from neounify.decode.choose import draw, penalise, probabilities
from neounify.errors import RequestError

VOCAB = 12


def _logits(seed: int, size: int = VOCAB) -> Tensor:
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _plain_probabilities(logits: Sequence[float], settings: SamplingSettings) -> list[float]:
    """Softmax at the temperature; the k likeliest; of these the fewest that hold top_p."""
    powers = [math.exp((x - max(logits)) / settings.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -powers[i])
    kept = order[: settings.top_k] if settings.top_k else order
    total, mass, nucleus = sum(powers[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        mass += powers[i] / total
        if mass >= settings.top_p:
            break
    total = sum(powers[i] for i in nucleus)
    return [powers[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@given(
    st.integers(0, 10_000),
    st.floats(0.1, 3),
    st.integers(0, VOCAB + 3),
    st.floats(0.02, 1),
)
def test_probabilities(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = _logits(seed)
    wanted = _plain_probabilities(logits.tolist(), settings)
    nudged = [
        _plain_probabilities(logits.tolist(), SamplingSettings(**{**vars(settings), "top_p": p}))
        for p in (max(top_p - 1e-5, 1e-6), min(top_p + 1e-5, 1.0))
    ]
    if any([x > 0 for x in other] != [x > 0 for x in wanted] for other in nudged):
        return  # a token on the very edge of the nucleus: rounding decides
    actual = probabilities(logits, settings)
    assert actual.tolist() == pytest.approx(wanted, abs=1e-5)
    assert [x > 0 for x in actual.tolist()] == [x > 0 for x in wanted]


def test_top_p_by_hand() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()

    def kept(**values: Any) -> list[int]:
        settings = SamplingSettings(temperature=1.0, **values)
        return probabilities(logits, settings).nonzero().flatten().tolist()

    assert kept(top_p=0.01) == [1]
    assert kept(top_p=0.49) == [1]
    assert kept(top_p=0.6) == [1, 2]
    assert kept(top_p=0.8) == [1, 2, 3]
    assert kept(top_p=0.95) == [0, 1, 2, 3]
    assert kept(top_p=1.0) == [0, 1, 2, 3]
    assert kept(top_k=1) == [1]
    assert kept(top_k=3) == [1, 2, 3]
    # top_k comes first: of the two that are left, the first holds two thirds.
    assert kept(top_k=2, top_p=0.66) == [1]
    assert kept(top_k=2, top_p=0.67) == [1, 2]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty(penalty: float) -> None:
    logits, context = _logits(3), [2, 5, 2, 2, 7]
    wanted = logits.tolist()
    for i in set(context):
        wanted[i] = wanted[i] / penalty if wanted[i] > 0 else wanted[i] * penalty
    before = logits.clone()
    assert penalise(logits, context, penalty).tolist() == pytest.approx(wanted)
    assert torch.equal(logits, before)
    assert penalise(logits, [], penalty).tolist() == before.tolist()


def test_a_penalty_changes_the_greedy_choice() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    choose = make_chooser(SamplingSettings(repetition_penalty=1.2))
    assert choose(logits, []) == 0
    assert choose(logits, [2, 1]) == 0
    assert choose(logits, [0]) == 1


def test_greedy() -> None:
    logits = _logits(0)
    assert make_chooser(SamplingSettings()) is greedy
    assert greedy(logits, [1, 2]) == int(logits.argmax())


def test_greedy_is_the_limit_of_low_temperature() -> None:
    choose = make_chooser(SamplingSettings(temperature=1e-3, seed=0))
    assert all(choose(_logits(i), []) == int(_logits(i).argmax()) for i in range(20))


def test_seeds_repeat_and_differ() -> None:
    def draws(seed: int | None) -> list[int]:
        choose = make_chooser(SamplingSettings(temperature=1.0, seed=seed))
        return [choose(_logits(i, 500), []) for i in range(30)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_a_request_draws_the_same_in_any_company() -> None:
    one = make_chooser(SamplingSettings(temperature=1.0, seed=5))
    alone = [one(_logits(i, 500), []) for i in range(10)]
    one = make_chooser(SamplingSettings(temperature=1.0, seed=5))
    other = make_chooser(SamplingSettings(temperature=1.0, seed=6))
    torch.manual_seed(0)
    together = []
    for i in range(10):
        together.append(one(_logits(i, 500), []))
        other(_logits(i, 500), [])
        torch.rand(3)
    assert together == alone


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=1.0, seed=0),
        SamplingSettings(temperature=0.7, top_k=6, seed=1),
        SamplingSettings(temperature=1.5, top_p=0.8, seed=2),
        SamplingSettings(temperature=1.0, repetition_penalty=1.5, seed=3),
    ],
)
def test_the_frequencies_of_draws(settings: SamplingSettings) -> None:
    """Chi-square of 4000 draws stays where all but one in a million would be."""
    logits, context, count = _logits(9), [0, 3, 4], 4000
    scores = penalise(logits, context, settings.repetition_penalty).tolist()
    wanted = _plain_probabilities(scores, settings)
    choose = make_chooser(settings)
    drawn = Counter(choose(logits, context) for _ in range(count))
    assert all(wanted[i] > 0 for i in drawn)
    kept = [i for i in range(VOCAB) if wanted[i] > 0]
    chi = sum((drawn[i] - count * wanted[i]) ** 2 / (count * wanted[i]) for i in kept)
    freedom = len(kept) - 1
    assert chi < freedom + 6 * math.sqrt(2 * freedom) + 12


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, math.nextafter(1.0, 0.0), 1.0])
def test_a_draw_never_takes_an_impossible_token(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends of 0..1, with impossible tokens first, last and between."""
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor(u, dtype=torch.float64))
    rng = random.Random(0)
    for _ in range(200):
        weights = [rng.choice([0.0, 0.0, rng.random(), 1e-9 * rng.random()]) for _ in range(9)]
        weights[rng.randrange(9)] = rng.random() + 0.1
        p = torch.tensor(weights)
        p = p / p.sum()
        token = draw(p, torch.Generator())
        assert p[token] > 0
        before, upto = p.double()[:token].sum(), p.double()[: token + 1].sum()
        assert before - 1e-7 <= u * p.double().sum() <= upto + 1e-7


def test_a_draw_takes_the_token_its_number_falls_on(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for u, token in ((0.0, 1), (0.2, 1), (0.25, 3), (0.74, 3), (0.75, 4), (0.999999, 4)):
        number = torch.tensor(u, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *args, n=number, **kwargs: n)
        assert draw(p, torch.Generator()) == token


def test_half_precision_logits() -> None:
    settings = SamplingSettings(temperature=1.0, seed=0)
    first = make_chooser(settings)(_logits(1).bfloat16(), [])
    assert first == make_chooser(settings)(_logits(1).bfloat16().float(), [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be from 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 101.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, "top_p must be"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingSettings(**values)
