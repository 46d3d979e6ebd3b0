"""Choosing tokens for many rows at once, against a plain implementation with loops."""

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

from neounify.config import TextSampling
from neounify.decode import sampler
from neounify.decode.sampler import (
    Distribution,
    SampledToken,
    SamplingBatch,
    SamplingState,
    draw,
)
from neounify.errors import CheckpointError, RequestError

VOCAB = 12


def _logits(seed: int, size: int = VOCAB) -> Tensor:
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _state(context: Sequence[int] = (), **values: Any) -> SamplingState:
    return SamplingState(TextSampling(**values), context)


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
    return SamplingBatch(states, logits.shape[1], logits.device).sample(logits)


def probabilities(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    return Distribution([s.settings for s in states], logits.shape[1], logits.device)(logits)


def _one(logits: Tensor, state: SamplingState) -> int:
    return sample(logits[None], [state])[0].token


def _plain_probabilities(logits: Sequence[float], settings: TextSampling) -> list[float]:
    """Softmax at the temperature; the k likeliest; the fewest that hold top_p; those above min_p.

    Of equal ones the first count as likelier.
    """
    powers = [math.exp((x - max(logits)) / settings.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -powers[i])
    kept = order[: settings.top_k] if settings.top_k else order
    total, mass, nucleus = sum(powers[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        mass += powers[i] / total
        if settings.top_p < 1 and mass >= settings.top_p:
            break
    nucleus = [i for i in nucleus if powers[i] >= settings.min_p * powers[nucleus[0]]]
    total = sum(powers[i] for i in nucleus)
    return [powers[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


def _on_an_edge(logits: Sequence[float], settings: TextSampling) -> bool:
    """Whether rounding decides about a token."""
    kept = set()
    for way in (1 - 1e-5, 1 + 1e-5):
        top_p, min_p = min(1.0, settings.top_p * way), min(1.0, settings.min_p * way)
        nudged = TextSampling(**{**vars(settings), "top_p": top_p, "min_p": min_p})
        kept.add(tuple(x > 1e-9 for x in _plain_probabilities(logits, nudged)))
    return len(kept) > 1


SETTINGS = st.builds(
    TextSampling,
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.one_of(st.just(1.0), st.floats(0.02, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
)


@pytest.mark.parametrize("ranked", [0, 3, 1024])
@given(st.lists(st.tuples(st.integers(0, 10_000), SETTINGS), min_size=1, max_size=6))
def test_probabilities(ranked: int, rows: list[tuple[int, TextSampling]]) -> None:
    """Whatever other rows there are, and whether tokens are ranked or counted by their bits."""
    rows = [(n, s) for n, s in rows if not _on_an_edge(_logits(n).tolist(), s)]
    if not rows:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "MAX_RANKED", ranked)
        logits = torch.stack([_logits(n) for n, _ in rows])
        actual = probabilities(logits, [SamplingState(s) for _, s in rows])
    for (n, settings), row in zip(rows, actual, strict=True):
        wanted = _plain_probabilities(_logits(n).tolist(), settings)
        assert (row / row.sum()).tolist() == pytest.approx(wanted, abs=1e-5)
        total = row.sum().item()
        assert [x > 1e-9 * total for x in row.tolist()] == [x > 1e-9 for x in wanted]


@pytest.mark.parametrize("ranked", [0, 1024])
@given(st.integers(0, 1000), st.integers(1, 11), st.floats(0.05, 0.999))
def test_of_equal_tokens_the_first_stay(ranked: int, seed: int, top_k: int, top_p: float) -> None:
    rng = random.Random(seed)
    logits = [float(rng.choice([0, 0, 1, 2])) for _ in range(VOCAB)]
    settings = TextSampling(temperature=1.0, top_k=top_k, top_p=top_p)
    if _on_an_edge(logits, settings):
        return
    wanted = [x > 0 for x in _plain_probabilities(logits, settings)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "MAX_RANKED", ranked)
        row = probabilities(torch.tensor([logits]), [SamplingState(settings)])[0]
    assert [x > 0 for x in row.tolist()] == wanted


def test_top_p_by_hand() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()

    def kept(**values: Any) -> list[int]:
        state = _state(temperature=1.0, **values)
        return probabilities(logits[None], [state])[0].nonzero().flatten().tolist()

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
    assert kept(min_p=0.25) == [1, 2, 3]
    assert kept(min_p=0.4) == [1, 2]
    assert kept(min_p=1.0) == [1]


def test_a_flat_distribution_needs_nearly_all_tokens() -> None:
    p = probabilities(torch.zeros(2, 5000), [_state(temperature=1.0, top_p=q) for q in (0.9, 0.1)])
    assert (p > 0).sum(dim=1).tolist() == pytest.approx([4500, 500], abs=2)
    assert p[1].nonzero().max() < 502


def _penalised(logits: Sequence[float], context: Sequence[int], penalty: float) -> list[float]:
    scores = list(logits)
    for i in set(context):
        scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
    return scores


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty(penalty: float) -> None:
    """Rows beside each other, the context growing."""
    context = [[2, 5, 2, 2, 7], [], [0, 1, 2, 3, 4, 5]]
    values = ((penalty, 3), (penalty, 4), (1.0, 5))
    logits = torch.stack([_logits(seed) for _, seed in values])
    states = [
        _state(tokens, repetition_penalty=p) for tokens, (p, _) in zip(context, values, strict=True)
    ]
    for _ in range(8):
        before = logits.clone()
        choices = sample(logits, states)
        assert torch.equal(logits, before)
        for state, tokens, choice, row, (p, _) in zip(
            states, context, choices, logits, values, strict=True
        ):
            wanted = _penalised(row.tolist(), tokens, p)
            assert choice.token == wanted.index(max(wanted))
            state.accept(choice.token)
            tokens.append(choice.token)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = torch.stack([_logits(n, 500) for n in range(9)])
    logits[3, [7, 9]] = 100
    wanted = logits.argmax(dim=1).tolist()
    assert wanted[3] == 7
    assert [c.token for c in sample(logits, [_state() for _ in range(9)])] == wanted


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-38, 5e-324])
def test_greedy_is_the_limit_of_low_temperature(temperature: float) -> None:
    state = _state(temperature=temperature, seed=0)
    assert all(_one(_logits(i), state) == int(_logits(i).argmax()) for i in range(20))


def test_seeds_repeat_and_differ() -> None:
    def draws(seed: int | None) -> list[int]:
        state = _state(temperature=1.0, seed=seed)
        return [_one(_logits(i, 500), state) for i in range(30)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_draws_are_those_of_a_plain_inverse_distribution() -> None:
    """One uniform number of the seed's generator per token, over tokens in order of their id."""
    settings = TextSampling(temperature=0.8, top_k=40, top_p=0.9, seed=11)
    state, generator = SamplingState(settings), torch.Generator().manual_seed(11)
    for step in range(50):
        logits = _logits(step, 300)
        u = torch.rand((), generator=generator, dtype=torch.float64).item()
        mass, wanted = 0.0, -1
        for token, p in enumerate(_plain_probabilities(logits.tolist(), settings)):
            mass += p
            if mass > u:
                wanted = token
                break
        assert _one(logits, state) == wanted


COMPANY: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 6, "top_k": 9},
    {"temperature": 1.3, "seed": 7, "top_p": 0.7, "logprobs": 2},
    {"temperature": 1.0, "seed": 8, "repetition_penalty": 1.4, "min_p": 0.05},
    {"repetition_penalty": 1.8},
]


def test_a_request_draws_the_same_in_any_batch() -> None:
    def logits(row: int, step: int) -> Tensor:
        return _logits(100 * row + step, 500)

    alone = []
    for row, values in enumerate(COMPANY):
        state = _state([1, 2], **values)
        drawn = []
        for step in range(12):
            drawn.append(sample(logits(row, step)[None], [state])[0])
            state.accept(drawn[-1].token)
        alone.append(drawn)
    states = [_state([1, 2], **values) for values in COMPANY]
    for step in range(12):
        torch.rand(3)
        # One after the other leaves, as requests do.
        there = [row for row in range(len(COMPANY)) if step < 6 or row != step - 6]
        choices = sample(
            torch.stack([logits(row, step) for row in there]), [states[row] for row in there]
        )
        for row, choice in zip(there, choices, strict=True):
            if step < 6:
                assert choice == alone[row][step]
                states[row].accept(choice.token)


@pytest.mark.parametrize(
    "settings",
    [
        TextSampling(temperature=1.0, seed=0),
        TextSampling(temperature=0.7, top_k=6, seed=1),
        TextSampling(temperature=1.5, top_p=0.8, seed=2),
        TextSampling(temperature=1.0, repetition_penalty=1.5, seed=3),
        TextSampling(temperature=1.0, min_p=0.1, seed=4),
    ],
)
def test_the_frequencies_of_draws(settings: TextSampling) -> None:
    """Chi-square of 4000 draws stays where all but one in a million would be."""
    logits, context, count = _logits(9), [0, 3, 4], 4000
    scores = _penalised(logits.tolist(), context, settings.repetition_penalty)
    wanted = _plain_probabilities(scores, settings)
    state = SamplingState(settings, context)
    drawn = Counter(_one(logits, state) for _ in range(count))
    assert all(wanted[i] > 0 for i in drawn)
    kept = [i for i in range(VOCAB) if wanted[i] > 0]
    chi = sum((drawn[i] - count * wanted[i]) ** 2 / (count * wanted[i]) for i in kept)
    freedom = len(kept) - 1
    assert chi < freedom + 6 * math.sqrt(2 * freedom) + 12


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, math.nextafter(1.0, 0.0), 1.0])
def test_a_draw_never_takes_an_impossible_token(u: float) -> None:
    """At both ends of 0..1, with impossible tokens first, last and between."""
    rng = random.Random(0)
    rows = []
    for _ in range(200):
        weights = [rng.choice([0.0, 0.0, rng.random(), 1e-9 * rng.random()]) for _ in range(9)]
        weights[rng.randrange(9)] = rng.random() + 0.1
        rows.append(weights)
    table = torch.tensor(rows)
    tokens = draw(table, torch.full((200,), u, dtype=torch.float64)).tolist()
    for p, token in zip(table, tokens, strict=True):
        assert p[token] > 0
        before, upto = p.double()[:token].sum(), p.double()[: token + 1].sum()
        assert before - 1e-7 <= u * p.double().sum() <= upto + 1e-7


def test_a_draw_takes_the_token_its_number_falls_on() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for u, token in ((0.0, 1), (0.2, 1), (0.25, 3), (0.74, 3), (0.75, 4), (0.999999, 4)):
        assert draw(p[None], torch.tensor([u], dtype=torch.float64)).tolist() == [token]


def test_half_precision_logits() -> None:
    values: dict[str, Any] = {"temperature": 1.0, "seed": 0}
    first = _one(_logits(1).bfloat16(), _state(**values))
    assert first == _one(_logits(1).bfloat16().float(), _state(**values))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("values", [{}, {"temperature": 1.0}, {"repetition_penalty": 2.0}])
def test_one_row_that_is_not_finite_fails_alone(bad: float, values: dict[str, Any]) -> None:
    logits = torch.stack([_logits(n, 50) for n in range(3)])
    states = [_state(temperature=1.0, seed=1), _state(**values), _state()]
    wanted = sample(logits, [_state(temperature=1.0, seed=1), _state(**values), _state()])
    logits[1, 20] = bad
    choices = sample(logits, states)
    assert (choices[0], choices[2]) == (wanted[0], wanted[2])
    assert choices[1].problem == "not finite"
    assert isinstance(choices[1].error(), CheckpointError)


class Allows:
    """A constraint that allows the tokens of one set after another, as bits or as booleans."""

    def __init__(self, allowed: Sequence[set[int]], *, packed: bool) -> None:
        self.allowed, self.packed, self.taken = list(allowed), packed, list[int]()

    def start(self) -> Allows:
        return self

    def mask(self) -> Tensor:
        now = self.allowed[len(self.taken)]
        if not self.packed:
            return torch.tensor([n in now for n in range(max(now, default=0) + 1)])
        words = [sum(1 << b for b in range(32) if 32 * w + b in now) for w in range(3)]
        return torch.tensor([x - (x >> 31 << 32) for x in words], dtype=torch.int32)

    def accept(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_allows_what_it_allows(packed: bool, temperature: float) -> None:
    allowed = [{3, 31, 32, 63}, {0}, {40, 64, 69}, {31}]
    constraint = Allows(allowed, packed=packed)
    state = _state(temperature=temperature, seed=2, constraint=constraint)
    free = _state()
    for step, tokens in enumerate(allowed):
        logits = torch.stack([_logits(step, 70), _logits(step, 70)])
        one, other = sample(logits, [state, free])
        assert one.token in tokens
        if not temperature:
            assert one.token == max(tokens, key=lambda n: logits[0, n].item())
        assert other.token == int(logits[1].argmax())
        state.accept(one.token)
    assert [token in ids for token, ids in zip(constraint.taken, allowed, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_that_allows_nothing_fails_its_row(temperature: float) -> None:
    state = _state(temperature=temperature, constraint=Allows([set()], packed=True))
    logits = torch.stack([_logits(0, 70), _logits(1, 70)])
    one, other = sample(logits, [state, _state()])
    assert one.problem == "nothing allowed"
    assert isinstance(one.error(), RequestError)
    assert other.token == int(logits[1].argmax())


def test_log_probabilities_are_the_models_own() -> None:
    """Whatever temperature, penalty and cuts say."""
    logits = torch.stack([_logits(n, 50) for n in range(3)])
    states = [
        _state([1, 2, 3], temperature=0.5, top_k=3, repetition_penalty=1.5, seed=1, logprobs=4),
        _state(),
        _state(logprobs=0),
    ]
    first, second, third = sample(logits, states)
    plain = logits[0].double().log_softmax(0)
    assert first.logprobs is not None
    assert third.logprobs is not None
    assert first.logprobs.chosen == pytest.approx(plain[first.token].item(), abs=1e-5)
    order = plain.argsort(descending=True)[:4].tolist()
    assert [token for token, _ in first.logprobs.top] == order
    values = [value for _, value in first.logprobs.top]
    assert values == pytest.approx(plain[order].tolist(), abs=1e-5)
    assert second.logprobs is None
    assert third.logprobs.top == ()
    assert third.logprobs.chosen == pytest.approx(
        logits[2].double().log_softmax(0).max().item(), abs=1e-5
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be from 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 101.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, "top_p must be"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"min_p": -0.1}, "min_p must be from 0"),
        ({"min_p": 1.1}, "min_p must be from 0"),
        ({"logprobs": -1}, "logprobs must be 0 to 20, got -1"),
        ({"logprobs": 21}, "logprobs must be 0 to 20"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be 0.01 to 100"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TextSampling(**values)
