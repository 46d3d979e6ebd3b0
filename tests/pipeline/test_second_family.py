"""Images of a small PixelUMM model: batches, previews, saved evaluations, solvers, a server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import neounify
from neounify.config.sampling import SolverName
from neounify.errors import PromptError
from neounify.flow.sampling import ImageSampling
from neounify.serve.build import colocated
from neounify.serve.service import EngineService
from neounify.tasks.image import ImageRequest
from support.models import assert_close, one_thread
from support.pixelumm import saved
from support.serving import collect, same_image, serve

__all__ = ["one_thread"]  # a fixture

SIZE: dict[str, Any] = {"width": 64, "height": 48, "steps": 5}
NEW: list[SolverName] = ["dpm2m", "unipc"]
pytestmark = pytest.mark.filterwarnings("ignore::neounify.errors.SizeWarning")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> neounify.Pipeline:
    return neounify.load(saved(tmp_path_factory.mktemp("family") / "model"))


@pytest.mark.parametrize("solver", NEW)
def test_an_image_is_the_same_alone_and_in_a_batch(
    pipe: neounify.Pipeline, solver: SolverName
) -> None:
    prompts, seeds = ["a boat", "two red hens on a roof", "x"], [5, 6, 7]
    together = pipe.generate(prompts, seed=seeds, solver=solver, **SIZE).pixels
    for prompt, seed, pixels in zip(prompts, seeds, together, strict=True):
        alone = pipe.generate(prompt, seed=seed, solver=solver, **SIZE)
        assert_close(alone.pixels[0], pixels, 2e-5)


def test_a_clip_is_the_same_alone_in_a_batch_and_with_streamed_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    pipe, streamed = neounify.load(folder), neounify.load(folder, memory="stream")
    size: dict[str, Any] = {"width": 64, "height": 48, "steps": 3, "frames": 8, "fps": 12}
    alone = pipe.generate("a boat", seed=3, **size).videos[0].frames
    together = pipe.generate(["two red hens", "a boat"], seed=[1, 3], **size).videos[1].frames
    assert (together.int() - alone.int()).abs().max() <= 1
    assert torch.equal(streamed.generate("a boat", seed=3, **size).videos[0].frames, alone)


def test_prompts_beyond_what_is_read_are_refused(pipe: neounify.Pipeline) -> None:
    message = "the (negative )?prompt has 20,000 tokens, this model reads 4,096 at most"
    settings: list[dict[str, Any]] = [{}, {"frames": 8}]
    for options in settings:
        for prompts in (("a " * 10_000, ""), ("a boat", "a " * 10_000)):
            with pytest.raises(PromptError, match=message):
                pipe.generate(prompts[0], negative_prompt=prompts[1], **SIZE, **options)


def test_previews_end_in_the_image(pipe: neounify.Pipeline) -> None:
    """x̂ of the last step is the image: dpm2m ends in it."""
    seen: list[neounify.ImageProgress] = []
    result = pipe.generate("a boat", callback=seen.append, shift=3.0, **SIZE)
    assert [progress.step for progress in seen] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(seen[-1].clean, result.pixels, rtol=0, atol=1e-5)
    assert seen[0].preview()[0].size == (64, 48)


@pytest.mark.parametrize("solver", NEW)
@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({}, 10),
        ({"guidance_reuse": 2}, 8),
        ({"guidance_stop": 1.0}, 8),
        ({"step_cache": 1.0, "step_cache_most": 1, "step_cache_warm": 1}, 8),
    ],
)
def test_evaluations_that_are_left_out(
    pipe: neounify.Pipeline, solver: SolverName, settings: dict[str, Any], evaluations: float
) -> None:
    full = pipe.generate("a boat", solver=solver, **SIZE)
    saved_some = pipe.generate("a boat", solver=solver, **SIZE, **settings)
    assert full.evaluations == [10]
    assert saved_some.evaluations[0] == pytest.approx(evaluations, abs=0.01)
    assert torch.equal(full.pixels, saved_some.pixels) == (not settings)
    assert torch.isfinite(saved_some.pixels).all()


@pytest.mark.parametrize(("fast", "steps"), [("half", 2), ("third", 1), (None, 3)])
def test_fast_keeps_the_solver_of_the_checkpoint(
    pipe: neounify.Pipeline, fast: Any, steps: int
) -> None:
    sampling = ImageSampling(fast=fast).resolve(pipe.config, editing=False)
    assert (sampling.steps, sampling.solver) == (steps, "dpm2m")
    result = pipe.generate("a boat", width=64, height=48, fast=fast)
    assert result.evaluations == [2 * steps]


def test_many_steps_of_unipc_at_one_cut_time(pipe: neounify.Pipeline) -> None:
    """Where the first two times are cut to one number, no step is lost."""
    few: dict[str, Any] = {"width": 16, "height": 16, "shift": 10.0, "guidance": 1.0}
    equal = pipe.generate("a boat", steps=113, solver="unipc", **few)
    assert equal.evaluations == [113]
    distinct = pipe.generate("a boat", steps=112, solver="unipc", **few)
    torch.testing.assert_close(equal.pixels, distinct.pixels, rtol=0, atol=0.05)


def test_a_service_gives_the_same_images(pipe: neounify.Pipeline) -> None:
    """Two requests in one batch, each with a preview."""
    sampling = ImageSampling(steps=5).resolve(pipe.config, editing=False)
    request = ImageRequest(prompt="a boat", width=64, height=48, seed=3, sampling=sampling)

    async def work(service: EngineService) -> list[Any]:
        return await asyncio.gather(*(collect(service, request, previews=1) for _ in range(2)))

    for answer in serve(colocated(pipe), work):
        same_image(answer.images[0], pipe.generate("a boat", seed=3, **SIZE).pixels[0])
        assert len(answer.previews) == 1
