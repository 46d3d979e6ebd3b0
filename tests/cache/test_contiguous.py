"""The cache of one sequence keeps what it was given, however it grows."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neounify.cache import SequenceCache, new_cache
from neounify.config import MlpConfig
from neounify.model import Image, Noise, Text
from support.models import random_config, random_model

CONFIG = random_config(
    random.Random(0),
    num_layers=2,
    num_kv_heads=2,
    num_heads=2,
    head_dim=8,
    und_mlp=MlpConfig(width=8),
    gen_mlp=MlpConfig(width=8),
)


def _cache(capacity: int) -> SequenceCache:
    cache = SequenceCache(CONFIG, capacity, dtype=torch.float32, device=torch.device("cpu"))
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    return cache


def _append(cache: SequenceCache, tokens: Tensor) -> None:
    """Write the same new tokens [n, kv_heads, d] to every layer, scaled by its number."""
    document = cache.document(Text(tokens.shape[0]))
    cache.reserve(tokens.shape[0])
    for layer in range(CONFIG.num_layers):
        cache.write(layer, tokens * (layer + 1), -tokens * (layer + 1))
    cache.advance(document)


def _check(cache: SequenceCache, tokens: Tensor) -> None:
    assert cache.length == tokens.shape[0]
    for layer in range(CONFIG.num_layers):
        k, v = cache.read(layer, cache.length)
        assert torch.equal(k, tokens.transpose(0, 1) * (layer + 1))
        assert torch.equal(v, -tokens.transpose(0, 1) * (layer + 1))


def _tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 8, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(1, 40), max_size=8), st.integers(0, 30))
def test_growing_keeps_the_contents(pieces: list[int], capacity: int) -> None:
    cache, tokens = _cache(capacity), _tokens(sum(pieces))
    for piece in tokens.split(pieces) if pieces else ():
        _append(cache, piece)
    _check(cache, tokens)
    assert cache.next_t == sum(pieces)
    assert cache.capacity >= cache.length


def test_no_memory_is_moved_while_there_is_room() -> None:
    cache = _cache(10)
    address = cache.keys.data_ptr()
    cache.reserve(10)
    _append(cache, _tokens(6))
    _append(cache, _tokens(4))
    assert cache.keys.data_ptr() == address
    assert cache.capacity == 10
    cache.reserve(0)
    assert cache.capacity == 10
    cache.reserve(1)
    assert cache.capacity > 11  # with room to spare


def test_many_single_tokens_move_the_memory_rarely() -> None:
    cache, tokens = _cache(1), _tokens(1500)
    capacities = set()
    for token in tokens:
        _append(cache, token[None])
        capacities.add(cache.capacity)
    _check(cache, tokens)
    assert len(capacities) < 8


def test_what_lies_behind_the_length_is_overwritten() -> None:
    """Written but not advanced over: the next write takes the same place."""
    cache, tokens = _cache(8), _tokens(5)
    _append(cache, tokens[:3])
    cache.write(0, _tokens(2, 1), _tokens(2, 2))
    _append(cache, tokens[3:])
    _check(cache, tokens)


def test_a_read_reaches_into_what_was_just_written() -> None:
    cache, tokens = _cache(8), _tokens(5)
    _append(cache, tokens[:3])
    cache.write(1, tokens[3:] * 2, tokens[3:])
    k, _ = cache.read(1, 5)
    assert torch.equal(k, tokens.transpose(0, 1) * 2)


def test_images_take_one_step_and_noise_none() -> None:
    cache = _cache(20)
    cache.advance(cache.document(Text(2), Noise(3, 3), Image(3, 3), Text(1)))
    assert (cache.length, cache.next_t) == (12, 4)
    document = cache.document(Noise(1, 2))
    assert (document.past, document.start_t) == (12, 4)
    cache.advance(document)
    assert (cache.length, cache.next_t) == (12, 4)


def test_a_cache_has_the_heads_that_its_model_computes() -> None:
    """A rank of several computes a share of them."""
    model = random_model(CONFIG, 0, torch.float32)
    whole = new_cache(model, 4)
    model.kv_heads += 1
    share = new_cache(model, 4)
    layers, d = CONFIG.num_layers, CONFIG.head_dim
    assert whole.keys.shape == whole.values.shape == (layers, CONFIG.num_kv_heads, 4, d)
    assert share.keys.shape == share.values.shape == (layers, CONFIG.num_kv_heads + 1, 4, d)
    assert (whole.keys.dtype, whole.keys.device) == (model.compute_dtype, model.device)
