"""The host waits for the device nowhere in a denoising step, and once in a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from neounify.cache import SequenceCache, new_cache, new_paged_cache
from neounify.config import ModelConfig, TextSampling, VideoConfig
from neounify.config.presets import TINY
from neounify.decode import sampler
from neounify.engine.denoiser import DenoiseJob, Denoiser, make_job
from neounify.engine.messages import (
    Decode,
    LocalTransport,
    Prefill,
    TextInput,
    new_number,
)
from neounify.engine.sequences import ContiguousCaches, KVCacheManager, PagedCaches
from neounify.engine.understanding import UnderstandingEngine
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify, Text
from neounify.model.layout import Grid, to_device
from neounify.quant import backends
from neounify.quant.linear import QuantLinear
from neounify.quant.rotation import hadamard
from neounify.runtime import memory_plan
from neounify.runtime.devices import Abilities
from neounify.runtime.plan import ExecutionPlan
from support.codes import with_codes
from support.device_abilities import pretending
from support.models import SPARSE_MLP
from support.other_device import watching

META = torch.device("meta")


def meta_model(config: ModelConfig = TINY) -> NeoUnify:
    return NeoUnify(config).requires_grad_(False).eval().to("meta", torch.bfloat16)


CODES = {
    # Preset, backend, operator of its layers: those with few rows of x are decoded.
    "int8": ("int8-all", "auto", "_int_mm"),
    "int8 reference": ("int8", "reference", "reference"),
    "w8a8": ("int8", "w8a8", "_int_mm"),
    "fp8": ("fp8", "auto", "scaled_mm"),
    "w4": ("w4", "auto", "_int_mm"),
    "w4 w8a8": ("w4", "w8a8", "_int_mm"),
}


@pytest.fixture(params=CODES)
def coded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NeoUnify:
    """A model of codes as it would be on a GPU, none of whose tensors is there yet."""
    preset, backend, operator = CODES[request.param]
    monkeypatch.setattr(backends, "has_kitchen", lambda: False)
    with pretending(Abilities(type="cuda", capability=(9, 0))):
        model = with_codes(meta_model(), preset, torch.device("cuda"), backend)
    assert {layer.backend.operator for layer in quant_linears(model)} == {operator}
    hadamard.cache_clear()
    return model


def quant_linears(model: NeoUnify) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


# --- denoising ---


GRIDS = (Grid(2, 2), Grid(2, 2), Grid(3, 1))
CLIPS = (Grid(2, 2, 2), Grid(2, 2, 2), Grid(3, 1, 3, 1.5))


def job(model: NeoUnify, grid: Grid, *, editing: bool = False, **values: Any) -> DenoiseJob:
    config = model.config
    prefixes: dict[Any, SequenceCache] = {}
    for branch, length in (("cond", 5), ("uncond", 2), ("image", 3)):
        cache = new_cache(model, length)
        cache.advance(cache.document(Text(length)))
        prefixes[branch] = cache
    sampling = ImageSampling(steps=8, guidance=3.0, **values).resolve(config, editing=editing)
    width = config.tube_width if grid.tubes else config.token_width
    return make_job(model, torch.randn(grid.length, width), grid, prefixes, sampling)


def waits_of_steps(
    values: dict[str, Any], model: NeoUnify | None = None, grids: Sequence[Grid] = GRIDS
) -> list[list[str]]:
    model = model or meta_model()
    by_step = []
    with watching() as device, torch.inference_mode():
        jobs = [job(model, grid, **values) for grid in grids]
        denoiser = Denoiser(model)
        for _ in range(5):
            device.waits.clear()
            denoiser.step(jobs)
            by_step.append(list(device.waits))
    return by_step


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"solver": "ab2"},
        {"solver": "dpm2m"},
        {"solver": "unipc"},
        {"guidance_norm": "global"},
        {"guidance_norm": "channel"},
        {"guidance_norm": "cfg_zero_star"},
        {"guidance_interval": (0.0, 0.4)},
        {"guidance_reuse": 2},
        {"editing": True, "image_guidance": 2.0},
        {"editing": True, "image_guidance": 2.0, "guidance_norm": "channel"},
    ],
    ids=str,
)
def test_no_wait_in_a_denoising_step(values: dict[str, Any]) -> None:
    """Neither in the first one, which uploads what all steps need."""
    assert waits_of_steps(values) == [[], [], [], [], []]


@pytest.mark.parametrize("solver", ["euler", "ab2", "dpm2m", "unipc"])
@pytest.mark.parametrize("norm", ["none", "global", "channel"])
def test_no_wait_in_a_step_of_clips(
    solver: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They move in pieces of two tokens."""
    config = TINY.replace(video=VideoConfig(tube_frames=4))
    monkeypatch.setattr(memory_plan, "PIECE_BYTES", 2 * 4 * config.tube_width)
    values = {"solver": solver, "guidance_norm": norm}
    assert waits_of_steps(values, meta_model(config), CLIPS) == [[], [], [], [], []]


def test_layers_of_codes_wait_nowhere(coded: NeoUnify) -> None:
    assert waits_of_steps({}, coded) == [[], [], [], [], []]


def test_grouped_experts_wait_nowhere() -> None:
    model = NeoUnify(replace(TINY, und_mlp=SPARSE_MLP, gen_mlp=SPARSE_MLP)).requires_grad_(False)
    model = model.eval().to("meta", torch.bfloat16)
    model.fuse()
    assert waits_of_steps({}, model) == [[], [], [], [], []]


def test_rules_that_decide_from_values_wait_once() -> None:
    """Between steps where guidance may stop, per image; in the step where layers are reused."""
    stopping = waits_of_steps({"guidance_stop": 0.001})
    assert [len(x) for x in stopping] == [0, 0, 0, 3, 0]
    assert all("guidance.py" in where for where in stopping[3])
    cached = waits_of_steps({"step_cache": 0.1, "step_cache_warm": 2})
    assert [len(x) for x in cached][:3] == [0, 0, 1]
    assert "denoiser.py" in cached[2][0]


# --- decoding ---


def contiguous(model: NeoUnify) -> KVCacheManager:
    return ContiguousCaches(model)


def paged(model: NeoUnify) -> KVCacheManager:
    return PagedCaches(new_paged_cache(model, 64, 4), LocalTransport())


SAMPLINGS = {
    "greedy": [TextSampling()],
    "drawn": [TextSampling(temperature=1.0, top_p=0.9, seed=1)],
    "mixed": [
        TextSampling(),
        TextSampling(temperature=0.7, top_k=5, min_p=0.1, logprobs=3),
        TextSampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2),
        TextSampling(logprobs=1),
    ],
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("caches", [contiguous, paged])
def test_one_wait_in_a_decoding_step(
    caches: Callable[[NeoUnify], KVCacheManager], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on cuda: devices without float64 draw on the host.
    monkeypatch.setattr(sampler, "FLOAT64_DEVICES", ("cpu", "meta"))
    check_decoding(meta_model(), caches, name)


@pytest.mark.parametrize("caches", [contiguous, paged])
def test_one_wait_in_a_decoding_step_of_codes(
    caches: Callable[[NeoUnify], KVCacheManager], coded: NeoUnify
) -> None:
    check_decoding(coded, caches, "greedy")


def check_decoding(
    model: NeoUnify, caches: Callable[[NeoUnify], KVCacheManager], name: str
) -> None:
    with watching() as device:
        engine = UnderstandingEngine(model, LocalTransport(), ExecutionPlan(), caches(model))
        for number, sampling in enumerate(SAMPLINGS[name]):
            call, sequence = new_number(), (new_number(), "cond")
            then = Decode(call, sequence, sampling, frozenset(), 20)
            prompt = (TextInput(tuple(range(3 + number))),)
            engine.submit(Prefill(call, {sequence: prompt}, {sequence: 20}, then))
        engine.step()
        for _ in range(6):
            device.waits.clear()
            engine.step()
            assert len(device.waits) == 1
            assert "_to_copy" in device.waits[0]
            assert "sampler.py" in device.waits[0]


# --- the check itself ---


def test_waits_are_seen() -> None:
    values = np.zeros(3, dtype=np.int64)
    with watching() as device:
        x = torch.empty(3, device=META)
        assert to_device(values, META).device == META
        assert not device.waits
        x.sum().item()
        x.tolist()
        bool(x.any())
        x.nonzero()
        x.cpu()
        torch.zeros(3).copy_(x)
        x.copy_(torch.zeros(3))
        torch.from_numpy(values).to(META)
        torch.tensor([1, 2], device=META)
        x[[0, 1]]
        x[range(2)] = 1
    assert len(device.waits) == 11
