"""Clips being denoised: the memory of a step, its pieces and calls, and the frames that come."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from neounify.attention import select
from neounify.cache import SequenceCache
from neounify.config import ModelConfig
from neounify.engine.denoiser import DenoiseJob, Denoiser, make_job
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import (
    Cancel,
    Failed,
    FramesReady,
    GenerateImages,
    LocalTensors,
    LocalTransport,
    Prefix,
)
from neounify.flow.guidance import Guidance
from neounify.flow.sampling import ImageSampling, ResolvedSampling
from neounify.image.clips import cut_levels, frame_levels, rows_to_frames
from neounify.model import Document, Layout, NeoUnify, Noise
from neounify.model.layout import Grid
from neounify.model.parts import GEN
from neounify.runtime import memory_plan
from neounify.runtime import plan as limits
from neounify.runtime.plan import ExecutionPlan, branches_apart, plan_execution
from neounify.tasks.video import draw_clip_noise
from support.allocations import allocations, peak
from support.models import random_model
from support.pixelumm import SMALL

GRID = Grid(2, 3, 4, 0.7)
"""Four tubes of six tokens, at 24 / 0.7 frames per second."""


@pytest.fixture(scope="module")
def model() -> NeoUnify:
    return random_model(SMALL, 0)


def caches(config: ModelConfig) -> dict[str, SequenceCache]:
    """Random prefixes of 3 and 5 tokens."""
    prefixes = {}
    for branch, length in (("cond", 5), ("uncond", 3)):
        random = torch.Generator().manual_seed(length)
        shape = (config.num_layers, config.num_kv_heads, length, config.head_dim)
        keys, values = (torch.randn(shape, generator=random) for _ in range(2))
        prefixes[branch] = SequenceCache.holding(keys, values, length)
    return prefixes


def sampled(**options: Any) -> ResolvedSampling:
    return ImageSampling(**({"steps": 5} | options)).resolve(SMALL, editing=False, video=True)


def started(model: NeoUnify, grid: Grid = GRID, seed: int = 1, **options: Any) -> DenoiseJob:
    noise = draw_clip_noise(model.config, grid, torch.Generator().manual_seed(seed))[0]
    prefixes: Any = caches(model.config)
    return make_job(model, noise, grid, prefixes, sampled(**options))


@torch.inference_mode()
def run(stepper: Denoiser, job: DenoiseJob) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The end of a clip, and what was predicted in each step."""
    clean = []
    while not job.done:
        stepper.step([job])
        assert job.clean is not None
        clean.append(job.clean)
    return job.z, clean


# --- pieces ---


@pytest.mark.parametrize("norm", ["none", "channel", "global", "cfg_zero_star"])
@pytest.mark.parametrize("solver", ["unipc", "dpm2m", "ab2", "euler"])
def test_pieces_change_no_bit(
    model: NeoUnify, monkeypatch: pytest.MonkeyPatch, solver: str, norm: str
) -> None:
    """Whatever their size; guidance begins in the middle, where a solver of images restarts."""
    options: dict[str, Any] = {
        "solver": solver,
        "guidance_norm": norm,
        "guidance_interval": (0.0, 0.6),
    }
    end, clean = run(Denoiser(model), started(model, **options))
    assert len(clean) == 5
    for rows in (1, 7):
        monkeypatch.setattr(memory_plan, "PIECE_BYTES", 4 * SMALL.tube_width * rows)
        job = started(model, **options)
        pieced, others = run(Denoiser(model), job)
        assert len(job._pieces()[0]) == -(-24 // rows)
        assert torch.equal(pieced, end)
        assert all(map(torch.equal, others, clean))


def test_a_step_works_with_few_tensors_of_the_size_of_a_clip(
    model: NeoUnify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the memory plan counts: state, predictions, the new point, and pieces."""
    monkeypatch.setattr(memory_plan, "PIECE_BYTES", 4 * SMALL.tube_width * 6)
    grid = Grid(2, 3, 20)

    @torch.inference_mode()
    def moves() -> None:
        job = started(model, grid, steps=6)
        job.previews = frozenset()
        while not job.done:
            # What is predicted is the caller's, and gone after the step.
            job.move({b: torch.full_like(job.z, 0.5) for b in job.branches()})
        assert job.clean is None

    size = 4 * SMALL.tube_width * grid.length
    assert memory_plan.state_bytes(SMALL, grid.length, clip=True) == 4 * size
    most = peak(allocations(moves))
    least, small = 6.5 * size, 2**16
    assert least < most - small <= (4 + 2 + 1) * size + memory_plan.PIECES * memory_plan.PIECE_BYTES


def test_only_previews_keep_the_predicted_clip(model: NeoUnify) -> None:
    job = started(model)
    job.previews = frozenset({2})
    kept = []
    with torch.inference_mode():
        while not job.done:
            Denoiser(model).step([job])
            kept.append(job.clean is not None)
    assert kept == [False, True, False, False, False]


# --- calls ---


def test_branches_are_apart_where_a_large_clip_has_no_memory_for_them() -> None:
    """One rule: a clip that fills calls alone, and more rows than memory is free for."""
    assert not branches_apart(limits.APART_TOKENS - 1, 2 * limits.APART_TOKENS, 1)
    assert not branches_apart(37_440, 74_880, 74_880)
    assert branches_apart(37_440, 74_880, 74_879)
    device, config = torch.device("cpu"), SMALL
    known = plan_execution(config, device, torch.float32, free_bytes=2**34)
    assert known.branch_rows == 2**33 // limits.head_bytes(config, 4, clip=True)
    assert plan_execution(config, device, torch.float32).branch_rows == limits.UNLIMITED


@pytest.mark.parametrize("options", [{}, {"guidance_reuse": 2}, {"step_cache": 0.9}])
def test_branches_one_after_the_other(
    model: NeoUnify, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    calls: list[int] = []
    layers = model.some_layers

    def counted(layout: Layout, *rest: Any) -> Generator[None, None, Any]:
        calls.append(len(layout.documents))
        return layers(layout, *rest)

    monkeypatch.setattr(model, "some_layers", counted)
    together, clean = run(Denoiser(model), started(model, **options))
    assert max(calls) == 2
    monkeypatch.setattr(limits, "APART_TOKENS", 24)
    calls.clear()
    job = started(model, **options)
    apart, others = run(Denoiser(model, ExecutionPlan(branch_rows=47)), job)
    assert max(calls) == 1
    for expected, actual in zip([together, *clean], [apart, *others], strict=True):
        assert (expected - actual).abs().max() <= 1e-6 * expected.abs().max()
    calls.clear()
    run(Denoiser(model, ExecutionPlan(branch_rows=48)), started(model, **options))
    assert max(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdpa", "blocks"])
def test_attention_is_linear_in_memory(name: str, dtype: torch.dtype) -> None:
    """The largest block of the layers, scratch of the kernels included, doubles with the tokens."""
    layers = random_model(SMALL, 0).to(dtype)
    layers.compute_dtype = dtype
    config = layers.config
    assert config.num_heads > config.num_kv_heads
    backend = select(torch.device("cpu"), dtype, config.head_dim, name)
    largest, most = [], []
    for tubes in (16, 32):
        layout = Layout([Document((Noise.of(Grid(8, 8, tubes, 0.7)),), past=300)])
        shape = (config.num_layers, config.num_kv_heads, 300, config.head_dim)
        keys, values = (torch.randn(shape, dtype=dtype) for _ in range(2))
        cache = SequenceCache.holding(keys, values, 300)
        x = torch.randn(64 * tubes, config.hidden_size, dtype=dtype)
        attend = backend.plan(layout, [cache])
        with torch.inference_mode():
            blocks = allocations(partial(layers.backbone, layout, {GEN: x}, attend))
        largest.append(max(blocks))
        most.append(peak(blocks))
    assert largest[1] <= 2 * largest[0]
    assert most[1] <= 2 * most[0]
    assert largest[1] < 2048**2


# --- frames ---


def clip(call: int, config: ModelConfig, count: int = 1) -> GenerateImages:
    prefixes: Any = {}
    for branch, cache in caches(config).items():
        tensors = {"keys": cache.keys, "values": cache.values}
        prefixes[branch] = Prefix(LocalTensors(tensors), cache.next_t)
    noise = draw_clip_noise(config, GRID, torch.Generator().manual_seed(call), count)
    ref = LocalTensors({"noise": noise})
    return GenerateImages(call, ref, GRID, sampled(steps=2), prefixes, frozenset({1}))


def drain(engine: GenerationEngine) -> None:
    while engine.busy:
        engine.step()


def test_a_finished_clip_comes_tube_by_tube(model: NeoUnify) -> None:
    """One in each step of the engine, so that no more than one need be in memory."""
    engine = GenerationEngine(model, LocalTransport(), ExecutionPlan(slice_seconds=60))
    engine.submit(clip(1, model.config))
    seen: list[FramesReady] = []
    while engine.busy:
        engine.step()
        new = [r for r in engine.replies if isinstance(r.answer, FramesReady)]
        assert len(new) <= 1
        if seen or new:
            assert len(engine.replies) == 1
            assert new[0].final is (len(seen) == 3)
            seen.append(new[0].answer)  # type: ignore[arg-type]
        engine.replies = []
    assert [(part.first, part.total) for part in seen] == [(0, 16), (4, 16), (8, 16), (12, 16)]
    frames = torch.cat([part.frames.tensors["frames"] for part in seen])  # type: ignore[attr-defined]
    job = started(model, steps=2)
    end, _ = run(Denoiser(model), job)
    assert torch.equal(frames, frame_levels(rows_to_frames(end, 2, 3, 16, 4)))


def test_a_clip_is_given_up_between_its_tubes(
    model: NeoUnify, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = GenerationEngine(model, LocalTransport(), ExecutionPlan(slice_seconds=60))
    for call in (1, 2):
        engine.submit(clip(call, model.config, count=2))
    while not any(isinstance(reply.answer, FramesReady) for reply in engine.replies):
        engine.step()
    engine.submit(Cancel(1))
    engine.replies = []
    drain(engine)
    assert {reply.call for reply in engine.replies} == {2}
    answers = [r for r in engine.replies if isinstance(r.answer, FramesReady)]
    assert [r.final for r in answers] == [False] * 7 + [True]

    def fails(*args: object) -> None:
        raise MemoryError

    engine.replies = []
    engine.submit(clip(3, model.config))
    monkeypatch.setattr("neounify.engine.generation.frame_levels", fails)
    drain(engine)
    assert isinstance(engine.replies[-1].answer, Failed)
    assert engine.replies[-1].final


def test_by_row_says_which_norms_look_at_a_whole_image() -> None:
    norms: list[Any] = ["none", "channel", "global"]
    by_norm = {norm: Guidance(norm=norm).by_row for norm in norms}
    assert by_norm == {"none": True, "channel": True, "global": False}
    assert not replace(Guidance(), norm="cfg_zero_star").by_row


def test_levels_are_cut_on_request(model: NeoUnify) -> None:
    """Of clips and images alike; -1, 1 and what lies outside stay where they are."""
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert ((cut_levels(values) + 1) / 2 * 255).round().tolist() == [0, 0, 127, 254, 255, 255]
    cut, plain = (started(model, published_solver=on) for on in (True, False))
    assert cut.cuts_levels
    assert not plain.cuts_levels
    engine = GenerationEngine(model, LocalTransport(), ExecutionPlan(slice_seconds=60))
    command = clip(1, model.config)
    engine.submit(replace(command, sampling=sampled(steps=2, published_solver=True)))
    drain(engine)
    parts = [r.answer.frames for r in engine.replies if isinstance(r.answer, FramesReady)]
    frames = torch.cat([part.tensors["frames"] for part in parts])  # type: ignore[attr-defined]
    end, _ = run(Denoiser(model), started(model, steps=2))
    pixels = rows_to_frames(end, 2, 3, 16, 4).clamp(-1, 1)
    levels = ((pixels + 1) / 2 * 255).to(torch.uint8)
    assert torch.equal(frames, levels.permute(0, 2, 3, 1))
