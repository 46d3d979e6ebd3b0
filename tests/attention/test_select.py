"""Choice of a backend, and that each kind of plan computes what the reference does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from neounify.attention import BACKENDS, AttentionPlan, select
from neounify.attention.backends import (
    ContiguousAttention,
    PagedAttention,
    PrefixAttention,
)
from neounify.attention.blocks import BlockAttention
from neounify.attention.padded import PaddedAttention
from neounify.cache import Cache, PagedKVCache, SequenceCache
from neounify.cache.key_values import text_keys
from neounify.config import MlpConfig, ModelConfig
from neounify.errors import ConfigError
from neounify.model import Document, Image, Layout, Noise, Text
from support.attention import CPU, HEADS, KV_HEADS, WIDTH, plan, streams
from support.models import random_config

LAYERS = 2
Caches = Sequence[Cache] | None
Case = tuple[Layout, Callable[[], Caches]]


def config() -> ModelConfig:
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH, "num_layers": LAYERS}
    mlps = {"und_mlp": MlpConfig(width=8), "gen_mlp": MlpConfig(width=8)}
    return random_config(random.Random(0), **sizes, **mlps)


def filled(cache: Cache, tokens: int) -> Cache:
    """A cache with random keys and values of some tokens, and poison wherever none was written."""
    generator = torch.Generator().manual_seed(tokens)
    cache.reserve(tokens)
    document = cache.document(Text(tokens))
    for layer in range(LAYERS):
        k, v = torch.randn(2, tokens, KV_HEADS, WIDTH, generator=generator, dtype=torch.float64)
        cache.write(layer, k, v)
    cache.advance(document)
    return cache


def contiguous(lengths: Sequence[int]) -> list[Cache]:
    caches: list[Cache] = []
    for length in lengths:
        cache = SequenceCache(config(), length + 2, dtype=torch.float64, device=CPU)
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
        caches.append(filled(cache, length))
    return caches


def paged(lengths: Sequence[int]) -> list[Cache]:
    pool = PagedKVCache(config(), 64, 4, dtype=torch.float64, device=CPU)
    for memory in (pool.keys, pool.values):
        memory[:, : pool.zero_slot] = float("nan")
    caches: list[Cache] = []
    for number, length in enumerate(lengths):
        keys = text_keys([number] * length, 0)
        sequence = pool.open(keys, 1)
        sequence.expect(keys)
        caches.append(filled(sequence, length))
    return caches


def training(rng: random.Random) -> Case:
    kinds = [
        lambda: (Text(rng.randint(3, 9)), Noise(2, 3)),
        lambda: (Text(2), Image(2, 2), Text(rng.randint(1, 9))),
        lambda: (Text(2), Image(3, 1), Text(4), Noise(2, 2), Image(2, 2), Text(3), Noise(1, 2)),
        lambda: (Noise(1, 2), Noise(1, 2), Text(rng.randint(1, 12))),
    ]
    return Layout(Document(rng.choice(kinds)()) for _ in range(12)), lambda: None


def decoding(rng: random.Random, make: Callable[[Sequence[int]], list[Cache]]) -> Case:
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(2, 6))]
    layout = Layout(cache.document(Text(1)) for cache in make(lengths))
    return layout, lambda: make(lengths)


def denoising(rng: random.Random) -> Case:
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
    grids = [Noise(rng.randint(1, 3), rng.randint(1, 3)) for _ in lengths]
    documents = (c.document(g) for c, g in zip(contiguous(lengths), grids, strict=True))
    return Layout(documents), lambda: contiguous(lengths)


CASES: dict[type[AttentionPlan], Callable[[random.Random], Case]] = {
    PaddedAttention: training,
    ContiguousAttention: lambda rng: decoding(rng, contiguous),
    PagedAttention: lambda rng: decoding(rng, paged),
    PrefixAttention: denoising,
}


def outputs(attend: AttentionPlan, layout: Layout, seed: int) -> list[Tensor]:
    """Of every layer, twice, and the gradients of a fixed loss where nothing is cached."""
    results: list[Tensor] = []
    for step in range(2):
        for layer in range(LAYERS):
            inputs = streams(layout, 10 * step + seed)
            with torch.set_grad_enabled(any(d.past for d in layout.documents) is False):
                out = attend(layer, inputs)
            results += [x.detach() for x in out.values()]
            if any(x.requires_grad for x in out.values()):
                torch.stack([x.square().sum() for x in out.values()]).sum().backward()
                results += [y.grad for x in inputs.values() for y in x if y.grad is not None]
    return results


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_each_kind_equals_blocks(kind: type[AttentionPlan], seed: int) -> None:
    layout, caches = CASES[kind](random.Random(seed))
    attend = plan(layout, caches())
    assert isinstance(attend, kind)
    reference = plan(layout, caches(), "blocks")
    assert isinstance(reference, BlockAttention)
    for mine, theirs in zip(
        outputs(attend, layout, seed), outputs(reference, layout, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_documents_that_continue_need_their_caches(name: str) -> None:
    layout = Layout([Document((Text(1),), past=3, start_t=3)])
    with pytest.raises(ValueError, match=r"need their caches: \[3\] tokens"):
        plan(layout, None, name)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'flush' is unknown; known are auto, sdpa, blocks, varlen, graphs"
    ):
        select(CPU, torch.float32, WIDTH, "flush")
    assert select(CPU, torch.float32, WIDTH).name == "sdpa"
    assert select(CPU, torch.float32, WIDTH) is select(CPU, torch.float32, WIDTH)
