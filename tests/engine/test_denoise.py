"""One image's trajectory, moved by predictions that a test makes up instead of a model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from neounify.cache import SequenceCache
from neounify.config.presets import TINY
from neounify.config.sampling import SolverName
from neounify.engine.denoiser import DenoiseJob, make_job
from neounify.flow.guidance import Branch, Guidance
from neounify.flow.path import cut_times, timesteps, velocity
from neounify.flow.sampling import ImageSampling, ResolvedSampling, make_solver
from neounify.model import NeoUnify
from neounify.model.layout import Grid


def _job(times: list[float], guidance: Guidance, solver: str = "ab2") -> DenoiseJob:
    return DenoiseJob(
        z=torch.zeros(1, 1, dtype=torch.float64),
        grid=Grid(1, 1),
        prefixes={},
        guidance=guidance,
        times=times,
        noise_scale=1.0,
        t_eps=1e-6,
        solver=make_solver(solver),
    )


def _move(job: DenoiseJob, fields: dict[Branch, float]) -> None:
    """A step in which each branch predicts the image that its velocity leads to."""
    remaining = 1 - job.t
    job.move({b: job.z + remaining * fields[b] for b in job.branches()})


def _end(steps: int, interval: tuple[float, float]) -> float:
    """From 0 along v_c = cos 3t, guided by v_u = -t² at g = 3 inside the interval."""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    job = _job(times, Guidance(text=3.0, interval=interval))
    while not job.done:
        _move(job, {"cond": math.cos(3 * job.t), "uncond": -job.t * job.t})
    return float(job.z)


def test_second_order_holds_across_the_end_of_a_guidance_interval() -> None:
    # The last guided step of n starts at 1/2, so guidance ends 1/n later.
    errors = []
    for steps in (100, 200, 400):
        stop = 0.5 + 1 / steps
        extra = 2 * (math.sin(3 * stop) / 3 + stop**3 / 3)
        errors.append(abs(_end(steps, (0.0, 0.5)) - math.sin(3) / 3 - extra))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


def test_the_standing_first_step_of_zero_star_is_not_extrapolated() -> None:
    job = _job([0.0, 0.25, 0.5, 1.0], Guidance(text=2.0, norm="cfg_zero_star"))
    same: dict[Branch, float] = {"cond": 1.0, "uncond": 1.0}
    _move(job, same)
    assert float(job.z) == 0
    _move(job, same)
    assert float(job.z) == pytest.approx(0.25)


def test_a_velocity_at_another_time_than_the_solvers() -> None:
    """v = (x̂ - z) / 0.9 leads the solver, which stands at 1 - t = 0.95, past x̂."""
    job = _job([0.05, 1.0], Guidance(text=1.0), solver="unipc")
    job.network_times = [0.1, 1.0]
    assert job.t == 0.1
    job.move({"cond": torch.tensor([[0.9]], dtype=torch.float64)})
    assert float(job.z) == pytest.approx(0.95)
    assert job.clean is not None
    assert float(job.clean) == pytest.approx(0.9)


@pytest.mark.parametrize(("restarts", "end"), [(True, 0.5 + 2 * 0.5), (False, 0.5 + 2.5 * 0.5)])
def test_a_solver_that_goes_on_where_guidance_begins(restarts: bool, end: float) -> None:
    """v_c = 1, guided 2: Euler's step from t = 0.5 after a reset, else 1.5 · 2 - 0.5 · 1."""
    job = _job([0.0, 0.5, 1.0], Guidance(text=2.0, interval=(0.4, 1.0)))
    job.restarts = restarts
    while not job.done:
        _move(job, {"cond": 1.0, "uncond": 0.0})
    assert float(job.z) == pytest.approx(end)


@pytest.mark.parametrize("solver", ["dpm2m", "unipc"])
def test_sampling_follows_the_conventions_of_a_checkpoint(solver: SolverName) -> None:
    flow = replace(TINY.flow, first_time=0.001, unipc_grid=100, restart_solver=False)
    config = TINY.replace(flow=flow)
    sampling = ImageSampling(steps=7, solver=solver).resolve(config, editing=False)
    job = _started(sampling)
    times = timesteps(7, TINY.sampling.shift, 0.001).tolist()
    assert job.times == times
    assert job.network_times == (cut_times(times, 100) if solver == "unipc" else times)
    assert (job.network_times != times) is (solver == "unipc")
    assert not job.restarts


@pytest.mark.parametrize(
    ("steps", "shift"),
    [(80, 1.0), (400, 1.0), (400, 3.0), (8, 3.0), (1000, 1e-3), (2, 1e-3), (1000, 1e3)],
)
def test_the_last_step_ends_in_the_clean_prediction(steps: int, shift: float) -> None:
    job = _started(ResolvedSampling(steps=steps, shift=shift, guidance=Guidance(text=1.0)))
    clean = torch.full_like(job.z, 0.25)
    while not job.done:
        job.move({"cond": clean})
    torch.testing.assert_close(job.z, clean)


def test_a_given_t_eps_clamps_as_published() -> None:
    """80 steps without a shift: the last 1 - t is 0.0125, and 62.5 % of the way is gone."""
    job = _started(ResolvedSampling(steps=80, shift=1.0, guidance=Guidance(text=1.0), t_eps=0.02))
    for _ in range(79):
        job.move({"cond": torch.ones_like(job.z)})
    before, t = job.z, timesteps(80, 1.0)[79].item()
    job.move({"cond": torch.ones_like(job.z)})
    torch.testing.assert_close(
        job.z, before + (1 - t) * velocity(1.0 - 0 * before, before, t, 0.02)
    )
    assert float((job.z - before).mean() / (1 - before).mean()) == pytest.approx(0.625, abs=1e-3)


def _started(sampling: ResolvedSampling) -> DenoiseJob:
    model = NeoUnify(TINY).eval()
    cache = SequenceCache(TINY, 1, dtype=torch.float32, device=torch.device("cpu"))
    noise: Tensor = torch.randn(
        1, 3 * TINY.token_size**2, generator=torch.Generator().manual_seed(0)
    )
    return make_job(model, noise, Grid(1, 1), {"cond": cache}, sampling)
