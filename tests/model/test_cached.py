"""Prefill, decoding and denoising over caches give what one mixed forward gives."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from neounify.attention import BACKENDS, blocks
from neounify.cache import SequenceCache
from neounify.config import MlpConfig, ModelConfig
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model import Layout, NeoUnify, Noise
from neounify.model.parts import GEN
from support import reference
from support.attention import plan
from support.models import (
    Maker,
    assert_close,
    exact,
    facts_of,
    pack,
    random_config,
    random_model,
    spans_of,
    weights_of,
)
from support.reference import Clean, Noisy

NAN = float("nan")


def _setup(seed: int = 0, **fixed: object) -> tuple[ModelConfig, NeoUnify, Maker]:
    rng = random.Random(seed)
    config = random_config(rng, **fixed)
    return config, random_model(config, seed, torch.float64), Maker(rng, config)


def _cache(config: ModelConfig, capacity: int = 2) -> SequenceCache:
    """A cache whose unwritten memory is poison: nothing may ever read it."""
    cache = SequenceCache(config, capacity, dtype=torch.float64, device=torch.device("cpu"))
    cache.keys.fill_(NAN)
    cache.values.fill_(NAN)
    return cache


def _input_of(
    cache: SequenceCache, spans: Sequence[reference.Span], config: ModelConfig
) -> ModelInput:
    seen = [span for span in spans if not isinstance(span, Noisy)]
    ids = [i for span in seen if isinstance(span, reference.Text) for i in span.ids]
    images = [torch.from_numpy(s.pixels).double() for s in seen if isinstance(s, Clean)]
    return ModelInput(cache, spans_of(seen, config), ids, images)


def _pieces(document: Sequence[reference.Span], size: int) -> list[reference.Span]:
    """The und part of a document in pieces: text `size` tokens at a time, each image whole."""
    pieces: list[reference.Span] = []
    for span in document:
        if isinstance(span, reference.Text):
            starts = range(0, len(span.ids), size)
            pieces.extend(reference.Text(span.ids[start : start + size]) for start in starts)
        elif isinstance(span, Clean):
            pieces.append(span)
    return pieces


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("sparse", [False, True])
def test_prefill_and_decode_equal_the_full_forward(size: int, sparse: bool) -> None:
    mlp = MlpConfig(width=20)
    if sparse:
        mlp = MlpConfig(
            width=0, num_experts=4, experts_per_token=2, expert_width=8, sparse=(True, True)
        )
    config, model, maker = _setup(1, num_layers=2, und_mlp=mlp, gen_mlp=mlp)
    document = [
        maker.text(3),
        *maker.clean((2, 2)),
        maker.text(5),
        *maker.noisy((1, 2), copy=True),
        maker.text(4),
    ]
    (answer,) = reference.forward([document], weights_of(model), facts_of(config))
    und = [i for i, token in enumerate(answer.tokens) if not token.gen]
    cache = _cache(config)
    with exact():
        for piece in _pieces(document, size):
            hidden = forward_und(model, [_input_of(cache, [piece], config)])
            row = und[cache.length - 1]
            assert_close(hidden[0], answer.hidden[row], 1e-9)
            assert_close(model.logits(hidden)[0], answer.logits[cache.length - 1], 1e-9)
    assert cache.length == len(und)
    assert cache.next_t == answer.tokens[-1].position[0] + 1
    for number, kv in enumerate(answer.kv):
        for actual, wanted in ((cache.keys, kv.keys), (cache.values, kv.values)):
            rows = actual[number, :, : cache.length].transpose(0, 1)
            assert_close(rows, wanted[und], 1e-9)


def test_sequences_fed_together_equal_each_alone() -> None:
    config, model, maker = _setup(2)
    documents: list[list[reference.Span]] = [
        [maker.text(4)],
        [maker.text(1), *maker.clean((2, 3)), maker.text(2)],
        [*maker.clean((1, 2))],
        [maker.text(7)],
    ]
    more: list[list[reference.Span]] = [[maker.text(n)] for n in (1, 1, 3, 1)]
    together = [_cache(config) for _ in documents]
    alone = [_cache(config) for _ in documents]
    for spans in (documents, more):
        both = forward_und(
            model, [_input_of(c, s, config) for c, s in zip(together, spans, strict=True)]
        )
        each = [
            forward_und(model, [_input_of(c, s, config)]) for c, s in zip(alone, spans, strict=True)
        ]
        assert_close(both, torch.cat(each), 1e-6)
    assert [c.length for c in together] == [c.length for c in alone]


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_long_text_behind_a_cache_is_cut_into_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CAUSAL_CHUNK", chunk)
    config, model, maker = _setup(3)
    document = [maker.text(2), *maker.clean((3, 2)), maker.text(3), maker.text(8)]
    (answer,) = reference.forward([document], weights_of(model), facts_of(config))
    cache = _cache(config)
    with exact():
        forward_und(model, [_input_of(cache, document[:3], config)])
        hidden = forward_und(model, [_input_of(cache, document[3:], config)])
    assert_close(hidden[0], answer.hidden[-1], 1e-9)


def _tokens_of_noise(span: Noisy, model: NeoUnify) -> Tensor:
    packed = pack([[span]], model.config, torch.float64)
    assert packed.z is not None
    assert packed.t is not None
    assert packed.noise_scale is not None
    return model.embed_noisy(packed.layout, packed.z, packed.t, packed.noise_scale)


@pytest.mark.parametrize("head", ["flow", "pixel"])
def test_denoising_over_a_prefix_equals_the_mixed_forward(head: str) -> None:
    config, model, maker = _setup(4, image_head=head, patch_size=4, merge=2)
    document = [
        maker.text(3),
        *maker.clean((2, 1)),
        maker.text(2),
        *maker.noisy((2, 3), blocks=2, copy=True),
        maker.text(3),
        *maker.noisy((1, 2)),
    ]
    (answer,) = reference.forward([document], weights_of(model), facts_of(config))
    cache = _cache(config)
    clean = iter(answer.clean)
    with exact():
        for span in document:
            if not isinstance(span, Noisy):
                forward_und(model, [_input_of(cache, [span], config)])
                continue
            layout = Layout([cache.document(*spans_of([span], config))])
            noise = {GEN: _tokens_of_noise(span, model)}
            hidden = model.backbone(layout, noise, plan(layout, [cache]))
            assert set(hidden) == {GEN}
            actual = model.clean_prediction(hidden[GEN], layout[GEN].grids)
            image = next(clean)
            packed = pack([[Noisy(image, "x", 0.5, 0.5)]], config, torch.float64)
            assert packed.z is not None
            assert_close(actual, packed.z, 1e-9)
    assert next(clean, None) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_denoising_only_reads_and_many_blocks_share_a_cache(backend: str) -> None:
    config, model, maker = _setup(5)
    spans = [maker.text(3), *maker.clean((2, 2)), maker.text(1)]
    cache, other = _cache(config, 50), _cache(config)
    forward_und(model, [_input_of(cache, spans, config), _input_of(other, [maker.text(2)], config)])
    before = cache.keys.clone(), cache.values.clone(), cache.length, cache.next_t
    blocks = [*maker.noisy((2, 3)), *maker.noisy((1, 1)), *maker.noisy((2, 3))]
    noisy = [span for span in blocks if isinstance(span, Noisy)]
    caches = [cache, other, cache]
    grids = [spans_of([span], config) for span in noisy]
    layout = Layout(c.document(*grid) for c, grid in zip(caches, grids, strict=True))
    embedded = [_tokens_of_noise(span, model) for span in noisy]
    attend = plan(layout, caches, backend)
    together = model.backbone(layout, {GEN: torch.cat(embedded)}, attend)[GEN]
    alone = []
    for c, grid, x in zip(caches, grids, embedded, strict=True):
        single = Layout([c.document(*grid)])
        alone.append(model.backbone(single, {GEN: x}, plan(single, [c], backend))[GEN])
    assert_close(together, torch.cat(alone), 1e-6)
    assert (cache.length, cache.next_t) == before[2:]
    np.testing.assert_array_equal(cache.keys.numpy(), before[0].numpy())  # NaN equals NaN here
    np.testing.assert_array_equal(cache.values.numpy(), before[1].numpy())


def test_a_generated_image_replaces_its_noise() -> None:
    config, model, maker = _setup(6)
    cache = _cache(config)
    forward_und(model, [_input_of(cache, [maker.text(3)], config)])
    noise = Layout([cache.document(Noise(2, 3))])
    image = _input_of(cache, maker.clean((2, 3)), config)
    clean = Layout([cache.document(*image.spans)])
    assert torch.equal(noise["gen"].positions, clean["und"].positions)
    forward_und(model, [image])
    assert cache.document(Noise(1, 1)).start_t == 4
