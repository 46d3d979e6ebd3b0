"""Decoding with contiguous caches in one memory: growth, ended sequences, isolation."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from neounify.attention.backends import ContiguousAttention
from neounify.attention.blocks import BlockAttention
from neounify.cache import SequenceCache
from neounify.cache.key_values import CacheBatch
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model import Layout, NeoUnify, Text
from support.attention import CPU, plan
from support.models import random_config, random_model

MODEL = random_model(random_config(random.Random(3)), 3)


def cache_of(length: int, seed: int = 0, capacity: int = 3) -> SequenceCache:
    """A cache of some text, with poison wherever none was written."""
    cache = SequenceCache(MODEL.config, capacity, dtype=torch.float32, device=CPU)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    forward_und(
        MODEL, [ModelInput(cache, (Text(length),), [(seed + n) % 29 for n in range(length)])]
    )
    return cache


def step(model: NeoUnify, caches: list[SequenceCache], token: int) -> Tensor:
    return forward_und(model, [ModelInput(cache, (Text(1),), [token]) for cache in caches])


def test_ended_sequences_and_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence computes what it would alone, and keeps it when it has ended."""
    monkeypatch.setattr(CacheBatch, "ROOM", 2)
    lengths = [5, 9, 4, 7, 6]
    together = [cache_of(n, seed) for seed, n in enumerate(lengths)]
    alone = [cache_of(n, seed) for seed, n in enumerate(lengths)]
    batches = set()
    running = list(range(5))
    for token in range(12):
        if token in (2, 4, 7, 9):
            running.pop(token % len(running))
        actual = step(MODEL, [together[n] for n in running], token)
        expected = [step(MODEL, [alone[n]], token)[0] for n in running]
        torch.testing.assert_close(actual, torch.stack(expected))
        batches.add(id(together[running[0]].batch))
    assert len(batches) > 2  # it grew, and left the ended sequences behind
    for joint, single in zip(together, alone, strict=True):
        assert (joint.length, joint.next_t) == (single.length, single.next_t)
        rows = slice(0, joint.length)
        torch.testing.assert_close(joint.keys[:, :, rows], single.keys[:, :, rows])
        torch.testing.assert_close(joint.values[:, :, rows], single.values[:, :, rows])


def test_a_batch_is_copied_only_when_it_must() -> None:
    caches = [cache_of(n) for n in (5, 9, 4, 7)]
    step(MODEL, caches, 1)
    batch = caches[0].batch
    for token in range(5):
        step(MODEL, caches, token)
        step(MODEL, caches[:3], token)  # three of four rows
    assert all(cache.batch is batch for cache in caches)
    step(MODEL, caches[:2], 1)  # half of them
    assert caches[0].batch is caches[1].batch is not batch
    assert caches[3].batch is batch


@pytest.mark.parametrize("broken", range(3))
def test_nan_in_one_sequence_reaches_no_other(broken: int) -> None:
    caches, alone = ([cache_of(n) for n in (3, 9, 6)] for _ in range(2))
    caches[broken].keys.fill_(float("nan"))
    caches[broken].values.fill_(float("nan"))
    for token in (4, 5):
        actual = step(MODEL, caches, token)
        for index in range(3):
            expected = step(MODEL, [alone[index]], token)[0]
            if index == broken:
                assert not torch.isfinite(actual[index]).any()
            else:
                torch.testing.assert_close(actual[index], expected)


def test_very_unequal_lengths_are_not_padded() -> None:
    caches = [cache_of(n) for n in (1, 1, 1, 1, 1, 40)]
    layout = Layout(cache.document(Text(1)) for cache in caches)
    assert ContiguousAttention.plan(layout, caches, CPU) is None
    assert isinstance(plan(layout, caches), BlockAttention)


def test_a_growing_cache_leaves_its_batch() -> None:
    caches = [cache_of(n) for n in (3, 4)]
    step(MODEL, caches, 1)
    kept = caches[0].keys[:, :, :4].clone()
    caches[0].reserve(10_000)
    assert caches[0].batch is None
    assert torch.equal(caches[0].keys[:, :, :4], kept)
    assert caches[1].batch is not None
