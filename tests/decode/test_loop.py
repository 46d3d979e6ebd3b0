"""Writing text: alone and in company, and the ways to end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from neounify.cache import Cache, SequenceCache
from neounify.config import TextSampling
from neounify.decode import Generation, ModelInput, SamplingState, decode, forward_und
from neounify.errors import CheckpointError
from neounify.model import Document, Layout, NeoUnify, Text
from support.models import batch_of, random_config, random_model

PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [3, 3, 3, 3, 3, 3, 3, 3]]


@cache
def _model() -> NeoUnify:
    config = random_config(random.Random(2), num_layers=2, vocab_size=47)
    return random_model(config, 2, torch.float64)


def _cache() -> SequenceCache:
    return SequenceCache(_model().config, 3, dtype=torch.float64, device=torch.device("cpu"))


def _generation(
    prompt: Sequence[int],
    limit: int,
    stop: Sequence[int] = (),
    settings: TextSampling | None = None,
    cache: Cache | None = None,
) -> Generation:
    sampling = SamplingState(settings or TextSampling(), prompt)
    return Generation(cache or _cache(), sampling, frozenset(stop), limit)


def _prefill(generations: Sequence[Generation], prompts: Sequence[Sequence[int]]) -> Tensor:
    """Prefill the prompt of each, in one call."""
    pairs = zip(generations, prompts, strict=True)
    return forward_und(
        _model(), [ModelInput(g.cache, (Text(len(ids)),), list(ids)) for g, ids in pairs]
    )


def _write(
    generations: Sequence[Generation], *prompts: Sequence[int]
) -> list[list[tuple[int, int]]]:
    return list(decode(_model(), generations, _prefill(generations, prompts)))


def _by_full_forwards(prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens without any cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(count):
        logits, _ = _model()(batch_of(Layout([Document((Text(len(ids)),))]), torch.tensor(ids)))
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_full_forwards() -> None:
    for prompt in PROMPTS:
        generation = _generation(prompt, 12)
        _write([generation], prompt)
        assert generation.ids == _by_full_forwards(prompt, 12)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_batch_writes_what_each_writes_alone(sampled: bool) -> None:
    settings = [
        TextSampling(temperature=float(sampled), seed=seed, repetition_penalty=1 + 0.2 * seed)
        for seed in range(len(PROMPTS))
    ]
    limits = [9, 4, 1, 12]

    def fresh() -> list[Generation]:
        rows = zip(PROMPTS, limits, settings, strict=True)
        return [_generation(prompt, limit, settings=own) for prompt, limit, own in rows]

    alone = []
    for prompt, generation in zip(PROMPTS, fresh(), strict=True):
        _write([generation], prompt)
        alone.append(generation.ids)
    together = fresh()
    steps = _write(together, *PROMPTS)
    assert [g.ids for g in together] == alone
    assert [len(ids) for ids in alone] == limits
    # What was yielded is what was written, step by step.
    assert [len(step) for step in steps] == [4, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1]
    for number, generation in enumerate(together):
        assert [t for step in steps for n, t in step if n == number] == generation.ids


def test_the_limit() -> None:
    generation = _generation(PROMPTS[0], 5)
    _write([generation], PROMPTS[0])
    assert len(generation.ids) == 5
    assert generation.finish_reason == "length"
    assert generation.stopped_by is None
    assert generation.pending == generation.ids[-1:]
    assert generation.cache.length == len(PROMPTS[0]) + 4


def test_a_stop_token_is_neither_written_nor_cached() -> None:
    free = _by_full_forwards(PROMPTS[0], 12)
    stop = free[6]
    before = free[: free.index(stop)]
    generation = _generation(PROMPTS[0], 12, [stop, 999])
    steps = _write([generation], PROMPTS[0])
    assert generation.ids == before
    assert generation.finish_reason == "stop"
    assert generation.stopped_by == stop
    assert generation.pending == []
    assert generation.cache.length == len(PROMPTS[0]) + len(before)
    assert len(steps) == len(before)


def test_a_stop_at_once_writes_nothing() -> None:
    stop = _by_full_forwards(PROMPTS[1], 1)
    generation = _generation(PROMPTS[1], 5, stop)
    assert _write([generation], PROMPTS[1]) == []
    assert generation.ids == []
    assert generation.stopped_by == stop[0]


def test_one_stops_and_the_others_go_on() -> None:
    free = _by_full_forwards(PROMPTS[0], 6)
    first = _generation(PROMPTS[0], 6, free[2:3])
    others = [_generation(prompt, 6) for prompt in PROMPTS[1:]]
    _write([first, *others], *PROMPTS)
    assert first.ids == free[: free.index(free[2])]
    for prompt, generation in zip(PROMPTS[1:], others, strict=True):
        assert generation.ids == _by_full_forwards(prompt, 6)


def test_resume_goes_on_after_a_stop_token() -> None:
    """The caller inputs the stop token itself; the limit counts over both parts."""
    free = _by_full_forwards(PROMPTS[0], 12)
    stop = free[4]
    generation = _generation(PROMPTS[0], 11, [stop])
    _write([generation], PROMPTS[0])
    written = len(generation.ids)
    assert (generation.finish_reason, generation.stopped_by) == ("stop", stop)
    generation.resume()
    assert generation.finish_reason is None
    hidden = forward_und(_model(), [ModelInput(generation.cache, (Text(1),), [stop])])
    generation.stop_ids = frozenset()
    list(decode(_model(), [generation], hidden))
    assert generation.ids == [*free[:written], *free[written + 1 :]][:11]
    assert generation.finish_reason == "length"


def test_pending_holds_what_the_limit_cut_off() -> None:
    """With the pending token fed, the text goes on as if there had been no limit."""
    generation = _generation(PROMPTS[3], 4)
    _write([generation], PROMPTS[3])
    more = _generation([], 5, cache=generation.cache)
    hidden = forward_und(_model(), [ModelInput(generation.cache, (Text(1),), generation.pending)])
    list(decode(_model(), [more], hidden))
    assert generation.ids + more.ids == _by_full_forwards(PROMPTS[3], 9)


def test_stop_from_outside() -> None:
    generations = [_generation(PROMPTS[0], 8), _generation(PROMPTS[2], 8)]
    for number, _ in enumerate(
        decode(_model(), generations, _prefill(generations, [PROMPTS[0], PROMPTS[2]]))
    ):
        if number == 2:
            generations[0].stop()
    assert len(generations[0].ids) == 3
    assert generations[0].finish_reason == "stop"
    assert generations[1].ids == _by_full_forwards(PROMPTS[2], 8)


def test_a_penalty_counts_the_prompt_and_what_was_written_but_no_stop_token() -> None:
    free = _by_full_forwards(PROMPTS[0], 12)
    settings = TextSampling(repetition_penalty=1.0001)
    generation = _generation(PROMPTS[0], 12, free[6:7], settings=settings)
    _write([generation], PROMPTS[0])
    seen = generation.sampling.seen(_model().config.vocab_size, _model().device)
    assert set(seen.nonzero().flatten().tolist()) == {*PROMPTS[0], *generation.ids}


def test_logprobs_come_with_every_token() -> None:
    generation = _generation(PROMPTS[0], 5, settings=TextSampling(logprobs=2))
    _write([generation], PROMPTS[0])
    assert len(generation.logprobs) == 5
    best = [found.top[0] for found in generation.logprobs]
    assert [token for token, _ in best] == generation.ids
    assert [value for _, value in best] == [found.chosen for found in generation.logprobs]


def test_a_model_that_is_not_finite_says_so() -> None:
    generation = _generation(PROMPTS[0], 5)
    hidden = _prefill([generation], PROMPTS[:1])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        list(decode(_model(), [generation], hidden * float("nan")))
