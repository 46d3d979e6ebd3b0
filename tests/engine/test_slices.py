"""Denoising steps are interrupted between layers: text never waits for a whole large step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import neounify
from neounify.config import TextSampling
from neounify.engine.generation import GenerationEngine, running_mean
from neounify.engine.messages import (
    Cancel,
    Command,
    Decode,
    DecodedToken,
    EngineReport,
    GenerateImages,
    ImageReady,
    LocalTensors,
    LocalTransport,
    Prefill,
    Prefix,
    Reply,
    TextInput,
)
from neounify.engine.understanding import UnderstandingEngine
from neounify.flow.sampling import ImageSampling
from neounify.model.layout import Grid
from neounify.runtime.plan import ExecutionPlan
from neounify.serve.engines import Worker

SMALL, LARGE = Grid(2, 2), Grid(6, 6)


def image_command(pipe: neounify.Pipeline, call: int, grid: Grid, steps: int) -> GenerateImages:
    config = pipe.config
    random = torch.Generator().manual_seed(call)
    shape = (config.num_layers, config.num_kv_heads, 3, config.head_dim)
    keys, values = (torch.randn(shape, generator=random) for _ in range(2))
    noise = torch.randn(1, grid.length, config.token_width, generator=random)
    prefix = Prefix(LocalTensors({"keys": keys, "values": values}), 3)
    sampling = ImageSampling(steps=steps, guidance=1.0).resolve(config, editing=False)
    return GenerateImages(
        call, LocalTensors({"noise": noise}), grid, sampling, {"cond": prefix}, frozenset()
    )


def engine(pipe: neounify.Pipeline, seconds: float) -> GenerationEngine:
    """A step has 16 image tokens at most, so that LARGE is above and SMALL below."""
    plan = ExecutionPlan(denoise_step_rows=16, slice_seconds=seconds, text_slice_seconds=seconds)
    return GenerationEngine(pipe.model, LocalTransport(), plan)


def test_the_first_step_sets_the_mean_of_what_steps_take() -> None:
    assert running_mean(0.0, 3.0) == 3.0
    assert running_mean(3.0, 8.0) == 4.0


def results(engine: GenerationEngine) -> dict[int, torch.Tensor]:
    pixels = {}
    for reply in engine.replies:
        assert isinstance(reply.answer, ImageReady)
        assert isinstance(reply.answer.pixels, LocalTensors)
        pixels[reply.call] = reply.answer.pixels.tensors["pixels"]
    return pixels


@pytest.mark.parametrize("beside_text", [False, True])
def test_slices_give_what_whole_steps_give(pipe: neounify.Pipeline, beside_text: bool) -> None:
    grids = {1: LARGE, 2: SMALL, 3: SMALL, 4: LARGE}
    expected: dict[int, torch.Tensor] = {}
    for call, grid in grids.items():
        alone = engine(pipe, 1e9)
        alone.submit(image_command(pipe, call, grid, 5))
        while alone.busy:
            alone.step()
        assert alone.counters["gen_steps"] == 5
        expected |= results(alone)
    sliced = engine(pipe, 0.0)
    for call, grid in grids.items():
        sliced.submit(image_command(pipe, call, grid, 5))
    calls = 0
    while sliced.busy:
        sliced.step(beside_text=beside_text)
        calls += 1
    assert calls >= pipe.config.num_layers * sliced.counters["gen_steps"]
    for call, pixels in results(sliced).items():
        torch.testing.assert_close(pixels, expected[call], atol=1e-5, rtol=0)
        if grids[call] == LARGE:
            assert torch.equal(pixels, expected[call])


def test_small_images_proceed_during_a_large_step(pipe: neounify.Pipeline) -> None:
    """A small image of three steps is finished before one step of the large one is."""
    sliced = engine(pipe, 0.0)
    sliced.submit(image_command(pipe, 1, LARGE, 2))
    sliced.step()
    whole: list[Any] = []
    sliced._denoiser.slices = lambda jobs: iter(whole.append(len(jobs)) or [None])  # type: ignore
    sliced.submit(image_command(pipe, 2, SMALL, 3))
    sliced.submit(image_command(pipe, 3, LARGE, 2))
    for _ in range(2):
        sliced.step()
    assert whole == [1]  # the small one alone: a second large one has to wait for the first


def test_a_call_given_up_in_the_middle_of_a_step_is_gone(pipe: neounify.Pipeline) -> None:
    sliced = engine(pipe, 0.0)
    sliced.submit(image_command(pipe, 1, LARGE, 2))
    sliced.step()
    sliced.submit(Cancel(1))
    assert sliced.gauges()["gen_images"] == 0
    assert len(sliced._running) == 0
    sliced.submit(image_command(pipe, 2, SMALL, 2))
    while sliced.busy:
        sliced.step()
    assert list(results(sliced)) == [2]


class Script:
    """A channel that gives commands one after the other, and notes what came between."""

    def __init__(self, commands: list[Command], layers: list[int]) -> None:
        self.commands, self.layers = [commands], layers
        self.since: list[int] = []

    def receive(self, *, wait: bool) -> list[Command] | None:
        if self.commands:
            return self.commands.pop()
        return None if wait else []

    def send(self, replies: Sequence[Reply], report: EngineReport | None) -> None:
        if any(isinstance(reply.answer, DecodedToken) for reply in replies):
            self.since.append(len(self.layers))
            self.layers.clear()


def test_the_next_token_is_one_slice_away(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a step is: here a slice is a layer, and between two tokens there is one."""
    layers: list[int] = []
    for layer in pipe.model.layers:
        forward = layer.forward

        def counted(streams: Any, *rest: Any, forward: Any = forward) -> Any:
            if "gen" in streams:
                layers.append(1)
            return forward(streams, *rest)

        monkeypatch.setattr(layer, "forward", counted)
    name = (1, "cond")
    then = Decode(2, name, TextSampling(), frozenset(), 20)
    commands: list[Command] = [
        Prefill(1, {name: (TextInput((1, 2, 3)),)}, {name: 20}, then),
        image_command(pipe, 3, LARGE, 30),
    ]
    script = Script(commands, layers)
    understanding = UnderstandingEngine(pipe.model, LocalTransport())
    Worker(script, understanding, engine(pipe, 0.0)).run()
    assert len(script.since) == 20
    assert max(script.since) == 1
