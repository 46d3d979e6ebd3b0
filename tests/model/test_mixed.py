"""The whole mixed forward against the reference, and packed against unpacked."""

from __future__ import annotations

import random

import pytest
import torch

from neounify.attention import blocks
from neounify.config import FlowConfig, MlpConfig, ModelConfig
from neounify.model import NeoUnify
from support.models import Maker, assert_close, exact, expected, pack, random_config, random_model

SPARSE = {
    "num_layers": 2,
    "und_mlp": MlpConfig(
        width=20,
        num_experts=5,
        experts_per_token=2,
        expert_width=12,
        sparse=(False, True),
        normalise_top_k=True,
    ),
    "gen_mlp": MlpConfig(
        width=0,
        num_experts=3,
        experts_per_token=2,
        expert_width=8,
        sparse=(True, True),
        normalise_top_k=True,
    ),
}
DENSE = {"und_mlp": MlpConfig(width=20), "gen_mlp": MlpConfig(width=36)}
KINDS: dict[str, dict[str, object]] = {
    "dense-flow": {**DENSE, "image_head": "flow", "attention_bias": True, "merge": 2},
    "dense-pixel": {**DENSE, "image_head": "pixel", "patch_size": 4, "merge": 2},
    "sparse": {**SPARSE, "image_head": "flow", "merge": 1},
    "tied": {**DENSE, "tie_embeddings": True, "attention_bias": False, "merge": 3, "patch_size": 4},
    "no-noise-scale": {**DENSE, "flow": FlowConfig(noise_scale_embedding=False), "merge": 2},
}


def _model(kind: str, dtype: torch.dtype) -> tuple[ModelConfig, NeoUnify, Maker]:
    rng = random.Random(kind)
    config = random_config(rng, **KINDS[kind])
    return config, random_model(config, 1, dtype), Maker(rng, config)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference_in_float64(kind: str) -> None:
    config, model, maker = _model(kind, torch.float64)
    documents = maker.showcase()
    logits, clean, _ = expected(documents, model)
    with exact():
        actual, prediction = pack(documents, config, torch.float64).run(model)
    assert_close(actual, logits, 1e-9)
    assert prediction is not None
    assert_close(prediction, clean, 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_reference_for_random_models_and_documents(seed: int) -> None:
    rng = random.Random(seed)
    config = random_config(rng)
    maker = Maker(rng, config)
    documents = [maker.document() for _ in range(rng.randint(1, 5))]
    model = random_model(config, seed)
    logits, clean, _ = expected(documents, model)
    packed = pack(documents, config, torch.float32)
    actual, prediction = packed.run(model)
    assert_close(actual, logits, 1e-5)
    if prediction is None:
        assert clean.shape[0] == 0
    else:
        assert_close(prediction, clean, 1e-5)
    model = model.double()
    with exact():
        actual, prediction = pack(documents, config, torch.float64).run(model)
    assert_close(actual, logits, 1e-9)
    if prediction is not None:
        assert_close(prediction, clean, 1e-9)


@pytest.mark.parametrize("kind", ["dense-flow", "dense-pixel", "sparse"])
def test_packed_equals_each_document_alone(kind: str) -> None:
    config, model, maker = _model(kind, torch.float64)
    documents = maker.showcase()
    together, clean = pack(documents, config, torch.float64).run(model)
    alone = [pack([document], config, torch.float64).run(model) for document in documents]
    assert clean is not None
    # Not in the exact context: even the float32 islands see the same numbers row by row.
    assert_close(together, torch.cat([logits for logits, _ in alone]), 1e-6)
    assert_close(clean, torch.cat([x for _, x in alone if x is not None]), 1e-6)


def test_the_order_of_documents_does_not_matter() -> None:
    config, model, maker = _model("sparse", torch.float64)
    documents = maker.showcase()
    lengths = [pack([d], config, torch.float64).layout["und"].length for d in documents]
    with exact():
        forwards, _ = pack(documents, config, torch.float64).run(model)
        backwards, _ = pack(documents[::-1], config, torch.float64).run(model)
    pieces = backwards.split(lengths[::-1])
    assert_close(forwards, torch.cat(pieces[::-1]), 1e-12)


def test_long_text_behind_an_image_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CAUSAL_CHUNK", 3)
    config, model, maker = _model("dense-flow", torch.float64)
    documents = [
        [maker.text(2), *maker.clean((2, 2)), maker.text(length), *maker.noisy((1, 2))]
        for length in (1, 2, 3, 4, 6, 11)
    ]
    logits, clean, _ = expected(documents, model)
    with exact():
        actual, prediction = pack(documents, config, torch.float64).run(model)
    assert_close(actual, logits, 1e-9)
    assert prediction is not None
    assert_close(prediction, clean, 1e-9)


def test_a_call_without_noise_gives_no_image() -> None:
    config, model, maker = _model("dense-flow", torch.float32)
    logits, clean = pack([[maker.text(4)]], config, torch.float32).run(model)
    assert logits.shape == (4, config.vocab_size)
    assert clean is None


def test_bfloat16_stays_near_float32() -> None:
    config, model, maker = _model("dense-flow", torch.float32)
    documents = maker.showcase()
    logits, clean = pack(documents, config, torch.float32).run(model)
    rough, rough_clean = pack(documents, config, torch.float32).run(model.to(torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    assert clean is not None
    assert rough_clean is not None
    assert_close(rough, logits, 0.1)
    assert_close(rough_clean, clean, 0.1)
