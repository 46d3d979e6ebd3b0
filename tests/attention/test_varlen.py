"""Packed attention: plans with the reference kernel against blocks, and the choice of a kernel."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from attention.test_select import LAYERS, config, contiguous, filled
from neounify.attention import AttentionPlan, Caches, select
from neounify.attention.varlen import (
    CAUSAL,
    PagedVarlen,
    PrefixVarlen,
    check_varlen,
    reference_varlen_attn,
)
from neounify.cache import Cache, PagedKVCache
from neounify.cache.key_values import text_keys
from neounify.errors import ConfigError
from neounify.model import Image, Layout, Noise, Span, Text
from neounify.runtime.devices import Abilities
from support.attention import CPU, WIDTH, plan, streams
from support.device_abilities import pretending


def paged(lengths: Sequence[int], room: int) -> list[Cache]:
    """Sequences of one pool, their pages in any order, with poison where nothing was written."""
    pool = PagedKVCache(config(), 96, 4, dtype=torch.float64, device=CPU)
    for memory in (pool.keys, pool.values):
        memory[:, : pool.zero_slot] = float("nan")
    holes = [pool.open(text_keys([90 + n] * 4, 0), 0) for n in range(6)]
    for hole in holes[::2]:
        pool.close(hole)
    caches: list[Cache] = []
    for number, length in enumerate(lengths):
        keys = text_keys([number] * length, 0)
        sequence = pool.open(keys, room)
        sequence.expect(keys)
        caches.append(filled(sequence, length) if length else sequence)
    return caches


def run(attend: AttentionPlan, layout: Layout, seed: int) -> list[Tensor]:
    with torch.no_grad():
        return [
            attend(layer, streams(layout, 10 * step + seed))[name].detach()
            for step in range(2)
            for layer in range(LAYERS)
            for name in layout.lengths
        ]


def same(
    layout: Layout, mine: Caches, theirs: Caches, kind: type[AttentionPlan], seed: int
) -> None:
    with torch.no_grad():
        attend = plan(layout, mine, "varlen")
        reference = plan(layout, theirs, "blocks")
    assert isinstance(attend, kind)
    for one, two in zip(run(attend, layout, seed), run(reference, layout, seed), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_prefill_and_decoding_in_pages(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 4, rng.randint(1, 20)]) for _ in range(rng.randint(1, 5))]
    kinds: list[tuple[Span, ...]] = [
        (Text(1),),
        (Text(rng.randint(2, 9)),),
        (Image(2, rng.randint(1, 3)),),
        (Text(3), Image(2, 2), Text(rng.randint(1, 5)), Image(1, 3)),
    ]
    spans = [rng.choice(kinds) if seed % 3 else kinds[0] for _ in lengths]
    mine, theirs = (paged(lengths, 24) for _ in range(2))
    layout = Layout(cache.document(*s) for cache, s in zip(mine, spans, strict=True))
    same(layout, mine, theirs, PagedVarlen, seed)


@pytest.mark.parametrize("seed", range(8))
def test_images_behind_prefixes(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
    grids = [Noise(rng.randint(1, 3), rng.randint(1, 3)) for _ in lengths]
    mine, theirs = (contiguous(lengths) for _ in range(2))
    layout = Layout(c.document(g) for c, g in zip(mine, grids, strict=True))
    same(layout, mine, theirs, PrefixVarlen, seed)


def test_gradients_go_another_way() -> None:
    caches = contiguous([3])
    layout = Layout([caches[0].document(Noise(2, 2))])
    assert not isinstance(plan(layout, caches, "varlen"), PrefixVarlen)


def test_the_reference_has_the_signature_of_the_kernel() -> None:
    kernel = inspect.signature(varlen_attn).parameters
    mine = inspect.signature(reference_varlen_attn).parameters
    assert set(mine) <= set(kernel)
    for name, parameter in mine.items():
        assert parameter.kind == kernel[name].kind
        assert parameter.default == kernel[name].default
    positional = [n for n, p in kernel.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional


def test_a_causal_window_is_aligned_to_the_end() -> None:
    q = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    k, v = torch.randn(2, 5, 2, WIDTH, dtype=torch.float64)
    three, five = (torch.tensor([0, n], dtype=torch.int32) for n in (3, 5))
    out = reference_varlen_attn(q, k, v, three, five, 3, 5, window_size=CAUSAL)
    for row in range(3):
        seen = slice(0, row + 3)
        one, keys, values = (x.transpose(0, 1)[None] for x in (q[row : row + 1], k[seen], v[seen]))
        wanted = scaled_dot_product_attention(one, keys, values)[0].transpose(0, 1)[0]
        torch.testing.assert_close(out[row], wanted, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="sequence 0 has 5 keys, max_k is 4"):
        reference_varlen_attn(q, k, v, three, five, 3, 4)


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    cuda = torch.device("cuda")
    with pretending(Abilities(type="cuda", capability=(9, 0))):
        check_varlen(cuda, torch.bfloat16, 128)
        for dtype, width, message in (
            (torch.float32, 128, r"needs bfloat16 or float16, not torch\.float32"),
            (torch.bfloat16, 12, "multiple of 8 up to 256 channels, not 12"),
            (torch.float16, 512, "multiple of 8 up to 256 channels, not 512"),
        ):
            with pytest.raises(ConfigError, match=message):
                check_varlen(cuda, dtype, width)
    with pytest.raises(ConfigError, match="no kernel for mps"):
        select(torch.device("mps"), torch.float16, 64, "varlen")


def test_every_image_counts_as_copied() -> None:
    assert select(CPU, torch.float32, WIDTH, "varlen").copied_rows(5000) == 5000
    assert select(CPU, torch.float32, WIDTH, "sdpa").copied_rows(5000) == 0
