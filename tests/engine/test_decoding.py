"""Decoding: alone and in a batch, and the ways to end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from neounify.config import TextSampling
from neounify.engine.messages import Append, Failed, Release, TextInput, new_number
from neounify.errors import CheckpointError
from neounify.model import Document, Layout, NeoUnify, Text
from support.decoding import Decoder, Written
from support.models import batch_of, random_config, random_model

PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [3, 3, 3, 3, 3, 3, 3, 3]]


@cache
def _model() -> NeoUnify:
    config = random_config(random.Random(2), num_layers=2, vocab_size=47)
    return random_model(config, 2, torch.float64)


def _written(
    prompt: Sequence[int],
    limit: int,
    stop: Sequence[int] = (),
    sampling: TextSampling | None = None,
) -> Written:
    decoder = Decoder(_model())
    written = decoder.start(prompt, limit, stop, sampling)
    decoder.run()
    return written


def _by_full_forwards(prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens without any cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(count):
        logits, *_ = _model()(batch_of(Layout([Document((Text(len(ids)),))]), torch.tensor(ids)))
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_full_forwards() -> None:
    for prompt in PROMPTS:
        assert _written(prompt, 12).ids == _by_full_forwards(prompt, 12)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_batch_writes_what_each_writes_alone(sampled: bool) -> None:
    settings = [
        TextSampling(temperature=float(sampled), seed=seed, repetition_penalty=1 + 0.2 * seed)
        for seed in range(len(PROMPTS))
    ]
    limits = [9, 4, 1, 12]
    rows = list(zip(PROMPTS, limits, settings, strict=True))
    alone = [_written(prompt, limit, (), sampling).ids for prompt, limit, sampling in rows]
    decoder = Decoder(_model())
    together = [decoder.start(prompt, limit, (), sampling) for prompt, limit, sampling in rows]
    steps = decoder.run()
    assert [written.ids for written in together] == alone
    assert [len(ids) for ids in alone] == limits
    # One token of each running sequence a step.
    assert steps == [4, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1]


def test_the_limit() -> None:
    written = _written(PROMPTS[0], 5)
    assert len(written.ids) == 5
    assert written.decoded.finish_reason == "length"
    assert written.decoded.stopped_by is None
    assert written.decoded.pending == (written.ids[-1],)
    assert written.length == len(PROMPTS[0]) + 4


def test_a_stop_token_is_neither_written_nor_cached() -> None:
    free = _by_full_forwards(PROMPTS[0], 12)
    stop = free[6]
    before = free[: free.index(stop)]
    written = _written(PROMPTS[0], 12, [stop, 999])
    assert written.ids == before
    assert written.decoded.finish_reason == "stop"
    assert written.decoded.stopped_by == stop
    assert written.decoded.pending == ()
    assert written.length == len(PROMPTS[0]) + len(before)


def test_a_stop_at_once_writes_nothing() -> None:
    stop = _by_full_forwards(PROMPTS[1], 1)
    written = _written(PROMPTS[1], 5, stop)
    assert written.ids == []
    assert written.decoded.stopped_by == stop[0]


def test_one_stops_and_the_others_continue() -> None:
    free = _by_full_forwards(PROMPTS[0], 6)
    decoder = Decoder(_model())
    first = decoder.start(PROMPTS[0], 6, free[2:3])
    others = [decoder.start(prompt, 6) for prompt in PROMPTS[1:]]
    decoder.run()
    assert first.ids == free[: free.index(free[2])]
    for prompt, written in zip(PROMPTS[1:], others, strict=True):
        assert written.ids == _by_full_forwards(prompt, 6)


def test_decoding_continues_after_a_stop_token() -> None:
    """The caller appends the stop token itself; the limit counts over both parts."""
    free = _by_full_forwards(PROMPTS[0], 12)
    stop = free[4]
    decoder = Decoder(_model())
    written = decoder.start(PROMPTS[0], 11, [stop])
    decoder.run()
    count = len(written.ids)
    assert (written.decoded.finish_reason, written.decoded.stopped_by) == ("stop", stop)
    decoder.engine.submit(Append(new_number(), {written.name: (TextInput((stop,)),)}))
    decoder.run()
    assert written.sequence.text is not None
    written.sequence.text.stop_ids = frozenset()
    decoder.resume(written, 11)
    decoder.run()
    assert written.ids == [*free[:count], *free[count + 1 :]][:11]
    assert written.decoded.finish_reason == "length"


def test_pending_holds_what_the_limit_cut_off() -> None:
    """With the pending token appended, the text continues as if there had been no limit."""
    written = _written(PROMPTS[3], 4)
    more = _written([*PROMPTS[3], *written.ids[:-1], *written.decoded.pending], 5)
    assert written.ids + more.ids == _by_full_forwards(PROMPTS[3], 9)


def test_a_released_sequence_ends_and_the_others_continue() -> None:
    decoder = Decoder(_model())
    first, other = decoder.start(PROMPTS[0], 8), decoder.start(PROMPTS[2], 8)
    for _ in range(3):
        decoder.step()
    decoder.engine.submit(Release((first.name,)))
    decoder.run()
    assert len(first.ids) == 3
    assert other.ids == _by_full_forwards(PROMPTS[2], 8)


def test_a_penalty_counts_the_prompt_and_what_was_written_but_no_stop_token() -> None:
    free = _by_full_forwards(PROMPTS[0], 12)
    written = _written(PROMPTS[0], 12, free[6:7], TextSampling(repetition_penalty=1.0001))
    assert written.sequence.text is not None
    seen = written.sequence.text.sampling.seen(_model().config.vocab_size, _model().device)
    assert set(seen.nonzero().flatten().tolist()) == {*PROMPTS[0], *written.ids}


def test_logprobs_come_with_every_token() -> None:
    written = _written(PROMPTS[0], 5, (), TextSampling(logprobs=2))
    logprobs = [token.logprobs for token in written.tokens if token.logprobs is not None]
    assert len(logprobs) == 5
    best = [entry.top[0] for entry in logprobs]
    assert [token for token, _ in best] == written.ids
    assert [value for _, value in best] == [entry.chosen for entry in logprobs]


def test_a_model_that_is_not_finite_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, logits = _model(), _model().logits
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden) * float("nan"))
    end = _written(PROMPTS[0], 5).end
    assert isinstance(end, Failed)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        raise end.exception()
