"""Schedules and solvers of the second family against its recorded arrays; no model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from neounify.flow.path import cut_times, timesteps
from neounify.flow.sampling import make_solver
from support.golden import load_fixture, needs_golden
from support.models import assert_close

FIRST_TIME, GRID = 0.001, 1000
pytestmark = needs_golden


def _cases(names: Iterable[str], kind: str, ending: str = "") -> dict[str, tuple[int, float]]:
    """Steps and shift of each recorded `kind.steps_shift` + `ending`, by the name before that."""
    cases = {}
    for name in names:
        if name.startswith(f"{kind}.") and name.endswith(ending):
            name = name.removesuffix(ending)
            steps, _, shift = name.removeprefix(f"{kind}.").partition("_")
            cases[name] = int(steps), float(shift)
    return cases


def test_schedules() -> None:
    recorded, _ = load_fixture("common", "schedule", family="pixelumm")
    dpm, unipc = _cases(recorded, "dpm"), _cases(recorded, "unipc", ".sigmas")
    assert (len(dpm), len(unipc)) == (6, 6)
    for name, (steps, shift) in dpm.items():
        assert_close(1 - timesteps(steps, shift, FIRST_TIME), recorded[name], 2e-7)
    for name, (steps, shift) in unipc.items():
        times = timesteps(steps, shift, FIRST_TIME)
        assert_close(1 - times, recorded[f"{name}.sigmas"], 2e-7)
        cut = cut_times(times.tolist(), GRID)[:-1]
        assert [round(GRID * (1 - t)) for t in cut] == recorded[f"{name}.timesteps"].tolist()


def _field(z: Tensor, t: float) -> Tensor:
    """The recorded velocity of the family, whose t is 1 - t and which leads to the noise."""
    u = torch.tensor(1 - t, dtype=torch.float32)
    return -(torch.tanh(z) * (0.5 + u) + u * u - 0.3)


@pytest.mark.parametrize(
    ("kind", "solver", "published", "tolerance"),
    [
        ("dpm", "dpm2m", True, 2e-6),
        ("dpm", "dpm2m", False, 5e-5),
        ("unipc", "unipc", False, 2e-6),
    ],
)
def test_trajectories(kind: str, solver: str, published: bool, tolerance: float) -> None:
    """Every point, velocity, time and end; the published x̂ of dpm2m loses digits at first."""
    recorded, _ = load_fixture("common", "solvers", family="pixelumm")
    cases = _cases(recorded, kind, ".final")
    assert len(cases) == (5 if kind == "dpm" else 7)
    for name, (steps, shift) in cases.items():
        integrator = make_solver(solver, published=published)
        times = timesteps(steps, shift, FIRST_TIME).tolist()
        taken = cut_times(times, GRID if kind == "unipc" else 0)[:-1]
        z, points, velocities = recorded["z0"], [], []
        for t, (start, end) in zip(taken, pairwise(times), strict=True):
            v = _field(z, t)
            points.append(z)
            velocities.append(-v)
            z = integrator.step(z, v, start, end)
        assert_close(z, recorded[f"{name}.final"], tolerance)
        if f"{name}.t" in recorded:
            seen = torch.tensor([1 - t for t in taken], dtype=torch.float64)
            assert_close(seen, recorded[f"{name}.t"], 1e-7)
        if f"{name}.z" in recorded:
            assert_close(torch.stack(points), recorded[f"{name}.z"], tolerance)
            assert_close(torch.stack(velocities), recorded[f"{name}.v"], tolerance)
