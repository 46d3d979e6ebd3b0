"""Paged sequences compute what contiguous ones do, shared prefixes included."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from neounify.cache import Cache, PagedKVCache, PagedSequence, SequenceCache, new_paged_cache
from neounify.cache.block_allocator import OutOfBlocks
from neounify.cache.key_values import TokenKey, image_keys, text_keys
from neounify.config import ModelConfig
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model import Image, NeoUnify, Text
from support.models import random_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[0, 1, 2])
def model(request: pytest.FixtureRequest) -> NeoUnify:
    torch.manual_seed(request.param)
    return NeoUnify(random_config(random.Random(request.param))).eval().requires_grad_(False)


def pool_of(model: NeoUnify, blocks: int = 64, size: int = 4) -> PagedKVCache:
    """A pool whose unwritten memory is poison: nothing may ever read it."""
    pool = PagedKVCache(model.config, blocks, size, dtype=torch.float32, device=CPU)
    for memory in (pool.keys, pool.values):
        memory[:, : pool.zero_slot] = float("nan")
    return pool


def own_cache(config: ModelConfig) -> SequenceCache:
    return SequenceCache(config, 0, dtype=torch.float32, device=CPU)


def give(model: NeoUnify, cache: Cache, ids: list[int], image: Tensor | None = None) -> Tensor:
    spans: tuple[Text | Image, ...] = (Text(len(ids)),)
    images: tuple[Tensor, ...] = ()
    if image is not None:
        spans, images = (Image.of(model.token_grid(image)), *spans), (image,)
    return forward_und(model, [ModelInput(cache, spans, ids, images)])[0]


def opened(pool: PagedKVCache, rows: list[TokenKey], room: int = 0) -> PagedSequence:
    sequence = pool.open(rows, room)
    sequence.expect(rows[sequence.length :])
    return sequence


def test_text_in_pieces_beside_others(model: NeoUnify) -> None:
    pool = pool_of(model)
    ids = [n % 29 for n in range(23)]
    other = opened(pool, text_keys([1, 2, 3, 4, 5], 0))
    give(model, other, [1, 2, 3])
    paged, alone = opened(pool, text_keys(ids, 0)), own_cache(model.config)
    for start, stop in ((0, 5), (5, 6), (6, 23)):
        expected = give(model, alone, ids[start:stop])
        torch.testing.assert_close(give(model, paged, ids[start:stop]), expected)
        give(model, other, [4]) if other.length < 5 else None
    k, v = paged.gather()
    torch.testing.assert_close(k, alone.keys[:, :, :23])
    torch.testing.assert_close(v, alone.values[:, :, :23])
    assert (paged.length, paged.next_t) == (23, 23)
    pool.check()


def test_many_single_tokens_at_once(model: NeoUnify) -> None:
    pool = pool_of(model)
    lengths = [1, 7, 4, 12]
    texts = [[(3 * n + k) % 29 for k in range(n)] for n in lengths]
    alone = [own_cache(model.config) for _ in lengths]
    paged = [opened(pool, text_keys(ids, 0), room=3) for ids in texts]
    for ids, a, p in zip(texts, alone, paged, strict=True):
        give(model, a, ids)
        give(model, p, ids)
    for step in range(3):
        new = [[(5 * step + n) % 29] for n in lengths]
        for p, ids in zip(paged, new, strict=True):
            p.expect(text_keys(ids, p.next_t))
        together = forward_und(
            model, [ModelInput(p, (Text(1),), i) for p, i in zip(paged, new, strict=True)]
        )
        expected = [give(model, a, ids) for a, ids in zip(alone, new, strict=True)]
        torch.testing.assert_close(together, torch.stack(expected))
    pool.check()


def test_nan_in_one_sequence_reaches_no_other(model: NeoUnify) -> None:
    """Whether it stands first, in the middle or last, is the longest or the shortest."""
    lengths = [3, 9, 1, 6]
    for broken in range(4):
        pool = pool_of(model)
        alone = [own_cache(model.config) for _ in lengths]
        paged = [opened(pool, text_keys([n] * n, 0), room=2) for n in lengths]
        for n, a, p in zip(lengths, alone, paged, strict=True):
            give(model, a, [n] * n)
            give(model, p, [n] * n)
        pool.keys[:, paged[broken].slot_mapping[: lengths[broken]]] = float("nan")
        pool.values[:, paged[broken].slot_mapping[: lengths[broken]]] = float("nan")
        for p in paged:
            p.expect(text_keys([7], p.next_t))
        together = forward_und(model, [ModelInput(p, (Text(1),), [7]) for p in paged])
        assert not torch.isfinite(together[broken]).any()
        for index in set(range(4)) - {broken}:
            torch.testing.assert_close(together[index], give(model, alone[index], [7]))
        assert not pool.keys[:, pool.zero_slot].any()
        assert not pool.values[:, pool.zero_slot].any()


def test_what_is_distrusted_is_not_used_again(model: NeoUnify) -> None:
    pool = pool_of(model)
    ids = [n % 29 for n in range(14)]
    one, two = (opened(pool, text_keys(ids, 0)) for _ in range(2))
    give(model, one, ids)
    give(model, two, ids)
    pool.invalidate(one)
    pool.check()
    three = opened(pool, text_keys(ids, 0))
    assert three.length == 0
    for sequence in (one, two, three):
        pool.close(sequence)
    pool.check()
    assert pool.allocator.in_use == 0


def test_a_known_beginning_is_not_computed_again(model: NeoUnify) -> None:
    pool = pool_of(model)
    first = [n % 29 for n in range(14)]
    one = opened(pool, text_keys(first, 0))
    give(model, one, first)
    pool.close(one)
    longer = [*first, 7, 8, 9]
    two = opened(pool, text_keys(longer, 0))
    assert two.length == two.next_t == 12  # three full blocks of four
    alone = own_cache(model.config)
    expected = give(model, alone, longer)
    torch.testing.assert_close(give(model, two, longer[12:]), expected)
    other = opened(pool, text_keys([5, *first[1:]], 0))
    assert other.length == 0
    pool.check()


def test_the_last_token_is_always_computed(model: NeoUnify) -> None:
    pool = pool_of(model)
    ids = [n % 29 for n in range(8)]
    one = opened(pool, text_keys(ids, 0))
    expected = give(model, one, ids)
    two = opened(pool, text_keys(ids, 0))
    assert two.length == 4
    torch.testing.assert_close(give(model, two, ids[4:]), expected)


def test_an_image_is_never_cut(model: NeoUnify) -> None:
    side = model.config.token_size
    pixels = torch.randn(3, 2 * side, 3 * side)
    for before in range(1, 6):
        pool = pool_of(model)
        ids, after = list(range(before)), [4, 5, 6, 7, 8]
        rows = [
            *text_keys(ids, 0),
            *image_keys(b"x", 6, before),
            *text_keys(after, before + 1),
        ]
        one, alone = opened(pool, rows), own_cache(model.config)
        for cache in (one, alone):
            give(model, cache, ids)
            give(model, cache, after, pixels)
        two = opened(pool, rows)
        assert not before < two.length < before + 6
        assert two.next_t == rows[two.length].t
        rest = after[two.length - before - 6 :] if two.length >= before + 6 else None
        if rest is not None:
            k, _ = alone.read(0, len(rows))
            give(model, two, rest)
            torch.testing.assert_close(two.read(0, len(rows))[0], k)
        assert opened(pool, [*rows[:before], *image_keys(b"y", 6, before)]).length <= before
        pool.check()


def test_room_is_all_or_nothing(model: NeoUnify) -> None:
    pool = pool_of(model, blocks=4)
    one = pool.open(text_keys([1, 2, 3], 0), room=5)
    assert pool.allocator.in_use == 2
    with pytest.raises(OutOfBlocks):
        pool.open(text_keys([1, 2, 3], 0), room=6)
    assert pool.allocator.in_use == 2
    pool.close(one)
    pool.close(one)
    assert pool.allocator.in_use == 0
    with pytest.raises(ValueError, match="in a room of 8"):
        one.reserve(9)


def test_a_paged_cache_has_the_heads_that_its_model_computes(
    model: NeoUnify, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = model.config.num_kv_heads + 1
    monkeypatch.setattr(model, "kv_heads", heads)
    pool = new_paged_cache(model, 4, 2)
    sequence = pool.open(text_keys(range(3), 0), 0)
    k = torch.randn(3, heads, model.config.head_dim)
    for layer in range(model.config.num_layers):
        sequence.write(layer, k, k)
    sequence.advance(sequence.document(Text(3)))
    assert torch.equal(sequence.read(0, 3)[0], k.transpose(0, 1))
