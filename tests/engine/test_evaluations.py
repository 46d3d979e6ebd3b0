"""Fewer evaluations of the network: what is left out and what is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import neounify
from neounify.config.presets import TINY
from neounify.engine.denoiser import DenoiseJob, Denoiser, Residuals
from neounify.errors import RequestError
from neounify.flow.guidance import Branch, Guidance, GuidanceRun
from neounify.flow.sampling import ImageSampling, StepCache, make_solver
from neounify.model.layout import Grid, Layout
from support.denoising import denoised, started

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reuse": {"guidance_reuse": 3},
    "stop": {"guidance_stop": 1.0},
    "cache": {"step_cache": 1.0, "step_cache_warm": 1},
    "all": {"guidance_reuse": 2, "guidance_stop": 0.5, "step_cache": 0.9, "solver": "ab2"},
}


def _clean(values: Mapping[Branch, float]) -> dict[Branch, Tensor]:
    return {branch: torch.tensor([[value]]) for branch, value in values.items()}


# --- guidance ---


def test_reused_guidance_keeps_the_distance_of_each_branch() -> None:
    run = GuidanceRun(Guidance(text=3.0, image=2.0, editing=True, reuse=3))
    assert run.branches(0.0) == ("cond", "image", "uncond")
    run.complete(0.0, _clean({"cond": 1.0, "image": 0.5, "uncond": -1.0}))
    for t, cond in ((0.2, 2.0), (0.4, 3.0)):
        assert run.branches(t) == ("cond",)
        whole = run.complete(t, _clean({"cond": cond}))
        assert {b: float(x) for b, x in whole.items()} == {
            "cond": cond,
            "image": cond - 0.5,
            "uncond": cond - 2.0,
        }
    assert run.branches(0.6) == ("cond", "image", "uncond")


def test_reuse_counts_guided_steps_only() -> None:
    run = GuidanceRun(Guidance(text=3.0, interval=(0.3, 1.0), reuse=2))
    assert run.branches(0.0) == run.branches(0.2) == ("cond",)
    assert run.branches(0.3) == ("cond", "uncond")


@pytest.mark.parametrize(("t", "uncond", "stops"), [(0.05, 0.96, False), (0.1, 0.96, True)])
def test_guidance_stops_for_good_once_it_changes_little(
    t: float, uncond: float, stops: bool
) -> None:
    run = GuidanceRun(Guidance(text=3.0, stop=0.05))
    run.complete(t, _clean({"cond": 1.0, "uncond": uncond}))
    assert run.acts_at(0.5) is not stops
    far = GuidanceRun(Guidance(text=3.0, stop=0.05))
    far.complete(0.5, _clean({"cond": 1.0, "uncond": 0.94}))
    assert far.branches(0.6) == ("cond", "uncond")


def test_three_branches_stop_together() -> None:
    """However close the conditional image is to that of the input images."""
    run = GuidanceRun(Guidance(text=3.0, image=2.0, editing=True, stop=0.05))
    run.complete(0.5, _clean({"cond": 1.0, "image": 0.99, "uncond": 0.5}))
    assert len(run.branches(0.6)) == 3


def test_reused_guidance_goes_on_along_the_same_field() -> None:
    """A second-order solver keeps its history: guided, the velocity is the same function of t."""

    def end(reuse: int) -> float:
        job = DenoiseJob(
            z=torch.zeros(1, 1, dtype=torch.float64),
            grid=Grid(1, 1),
            prefixes={},
            guidance=Guidance(text=2.0, reuse=reuse),
            times=[n / 10 for n in range(11)],
            noise_scale=1.0,
            t_eps=1e-6,
            solver=make_solver("ab2"),
        )
        fields: dict[Branch, float] = {"cond": 1.0, "uncond": 0.5}
        while not job.done:
            job.move({b: torch.full_like(job.z, 3 * fields[b]) for b in job.branches()})
        return float(job.z)

    assert end(2) == pytest.approx(end(1), abs=1e-12)


# --- step cache ---


def _cached(**values: Any) -> DenoiseJob:
    job = DenoiseJob(
        z=torch.zeros(1, 1),
        grid=Grid(1, 1),
        prefixes={},
        guidance=Guidance(text=1.0),
        times=[0.0, 0.5, 1.0],
        noise_scale=1.0,
        t_eps=0.02,
        solver=make_solver("euler"),
        cache=StepCache(**values),
        steps_done=5,
    )
    job.residuals["cond"] = Residuals(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2))
    return job


def test_a_step_is_reused_while_the_first_layer_changes_little() -> None:
    job = _cached(threshold=0.1, most=2)
    assert job.reuses("cond", torch.tensor([[1.05, -1.05]]))
    assert not job.reuses("cond", torch.tensor([[1.1, -1.15]]))
    assert job.reuses("uncond", torch.tensor([[1.0, -1.0]])) is None
    job.residuals["cond"].reused = 2
    assert job.reuses("cond", torch.tensor([[1.0, -1.0]])) is None
    assert _cached(threshold=0.1, warm=6).reuses("cond", torch.tensor([[1.0, -1.0]])) is None


# --- the whole ---


@pytest.fixture
def counted(pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Layers that ran, counted once for each image of the call, and calls of whole networks."""
    counts: Counter[str] = Counter()
    some_layers = pipe.model.some_layers

    def counting(
        layout: Layout, hidden: Any, attend: Any, numbers: range, rows: Any = None
    ) -> Generator[None, None, Any]:
        counts["layers"] += len(layout["gen"].grids) * len(numbers)
        return some_layers(layout, hidden, attend, numbers, rows)

    monkeypatch.setattr(pipe.model, "some_layers", counting)
    return counts


@pytest.mark.parametrize("name", RULES)
def test_evaluations_are_the_counted_calls(
    pipe: neounify.Pipeline, counted: Counter[str], name: str
) -> None:
    counted.clear()
    result = pipe.generate(["a boat", "a cat"], width=64, height=64, steps=8, seed=1, **RULES[name])
    layers = pipe.config.num_layers
    plain = 2 * 8 * 2
    assert sum(result.evaluations) * layers == pytest.approx(counted["layers"])
    assert sum(result.evaluations) == plain if name == "plain" else sum(result.evaluations) < plain


@pytest.mark.parametrize("name", RULES)
def test_an_image_is_the_same_alone_and_in_a_batch(pipe: neounify.Pipeline, name: str) -> None:
    prompts, rules = ("a boat", "a house on a hill", "a cat"), list(RULES.values())

    def jobs() -> list[DenoiseJob]:
        mixed = [RULES[name], *rules[:2]]
        return [
            started(pipe, prompt, 64 + 32 * n, 7 - n, **rule)
            for n, (prompt, rule) in enumerate(zip(prompts, mixed, strict=True))
        ]

    alone = [denoised(Denoiser(pipe.model), [job])[0] for job in jobs()]
    together = jobs()
    ends = denoised(Denoiser(pipe.model), together, late=1)
    for expected, actual in zip(alone, ends, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    apart = [started(pipe, "a boat", 64, 7, **RULES[name])]
    denoised(Denoiser(pipe.model), apart)
    assert apart[0].layers_run == together[0].layers_run


@pytest.mark.parametrize(
    "off",
    [{"guidance_reuse": 1, "guidance_stop": 0.0, "step_cache": 0.0}, {"step_cache": 1e-9}],
)
def test_a_rule_that_is_off_changes_no_bit(pipe: neounify.Pipeline, off: dict[str, Any]) -> None:
    """Also a step cache that finds nothing to reuse."""
    plain = denoised(Denoiser(pipe.model), [started(pipe, "a boat", 64, 6)])
    same = denoised(Denoiser(pipe.model), [started(pipe, "a boat", 64, 6, **off)])
    assert torch.equal(plain[0], same[0])


@torch.inference_mode()
def test_a_cached_step_given_up_half_way_has_changed_nothing(pipe: neounify.Pipeline) -> None:
    job = started(pipe, "a boat", 64, 6, step_cache=1.0, step_cache_warm=1)
    stepper = Denoiser(pipe.model)
    for _ in range(2):
        stepper.step([job])
    before = job.layers_run, {b: kept.reused for b, kept in job.residuals.items()}
    next(stepper.slices([job]))
    assert (job.layers_run, {b: kept.reused for b, kept in job.residuals.items()}) == before


@pytest.mark.parametrize(
    ("fast", "steps", "solver"), [("half", 4, "euler"), ("third", 2, "ab2"), (None, 8, "euler")]
)
def test_fast_is_a_share_of_the_checkpoints_steps(fast: Any, steps: int, solver: str) -> None:
    assert TINY.sampling.steps == 8
    sampling = ImageSampling(fast=fast).resolve(TINY, editing=False)
    assert (sampling.steps, sampling.solver) == (steps, solver)
    named = ImageSampling(fast=fast, solver="dpm2m").resolve(TINY, editing=False)
    assert named.solver == "dpm2m"
    second = TINY.replace(sampling=replace(TINY.sampling, solver="unipc"))
    assert ImageSampling(fast=fast).resolve(second, editing=False).solver == "unipc"


def test_fast_and_steps_are_one_too_many() -> None:
    with pytest.raises(RequestError, match="fast 'half' sets the number of steps"):
        ImageSampling(fast="half", steps=10)
