"""The integrators, on equations whose solution is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from neounify.errors import RequestError
from neounify.flow.path import shift_time
from neounify.flow.sampling import SOLVERS, ImageSampling, make_solver


def _times(steps: int, shift: float) -> list[float]:
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def _error(name: str, steps: int, shift: float) -> float:
    """dz/dt = cos(3t) - 2z from z(0) = 1, whose solution is known, integrated to t = 1."""
    solver = make_solver(name)
    z = torch.tensor(1.0, dtype=torch.float64)
    times = _times(steps, shift)
    for t, t_next in pairwise(times):
        z = solver.step(z, math.cos(3 * t) - 2 * z, t, t_next)
    particular = (2 * math.cos(3) + 3 * math.sin(3)) / 13
    return abs(float(z) - particular - (1 - 2 / 13) * math.exp(-2))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_convergence(name: str, order: int, shift: float) -> None:
    errors = [_error(name, steps, shift) for steps in (100, 200, 400)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", SOLVERS)
def test_exact_on_a_constant_velocity(name: str) -> None:
    solver, z = make_solver(name), torch.zeros(3, dtype=torch.float64)
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    times = _times(7, 3.0)
    for t, t_next in pairwise(times):
        z = solver.step(z, v, t, t_next)
    torch.testing.assert_close(z, v)


def test_second_order_is_exact_on_a_linear_velocity_after_its_first_step() -> None:
    """v = 2t gives z = t², steps of any lengths; the first step has nothing to look back at."""
    solver = make_solver("ab2")
    times = [0.0, 0.1, 0.15, 0.5, 0.6, 1.0]
    z = solver.step(torch.tensor(0.01, dtype=torch.float64), torch.tensor(0.0), 0.0, 0.1)
    assert z == pytest.approx(0.01)
    for t, t_next in pairwise(times[1:]):
        z = solver.step(z, torch.tensor(2 * t, dtype=torch.float64), t, t_next)
        assert float(z) == pytest.approx(t_next**2, abs=1e-12)


def test_the_first_step_is_eulers() -> None:
    z, v = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    steps = [make_solver(name).step(z, v, 0.2, 0.7) for name in ("euler", "ab2")]
    assert torch.equal(*steps)
    torch.testing.assert_close(steps[0], z + 0.5 * v)


def test_a_solver_does_not_change_its_input() -> None:
    z, v = torch.ones(2), torch.ones(2)
    for name in SOLVERS:
        solver = make_solver(name)
        solver.step(z, v, 0.0, 0.5)
        solver.step(z, v, 0.5, 1.0)
    assert torch.equal(z, torch.ones(2))
    assert torch.equal(v, torch.ones(2))


def test_solvers_do_not_share_a_past() -> None:
    first, second = make_solver("ab2"), make_solver("ab2")
    z = torch.zeros(1)
    first.step(z, torch.ones(1), 0.0, 0.5)
    assert float(second.step(z, torch.full((1,), 3.0), 0.5, 1.0)) == 1.5


def test_an_unknown_solver() -> None:
    with pytest.raises(RequestError, match=r"'heun' is unknown; known: euler, ab2, dpm2m"):
        make_solver("heun")
    with pytest.raises(RequestError, match="solver '' is unknown"):
        ImageSampling(solver="")  # type: ignore[arg-type]


def _switched(steps: int, *, reset: bool) -> float:
    """The error of ab2 on a velocity that jumps from 1 + 2t to -3t² at t = 1/2."""
    solver, z = make_solver("ab2"), torch.tensor(0.0, dtype=torch.float64)
    for t, t_next in pairwise(_times(steps, 1.0)):
        if reset and t == 0.5:
            solver.reset()
        v = 1 + 2 * t if t < 0.5 else -3 * t * t
        z = solver.step(z, torch.tensor(v, dtype=torch.float64), t, t_next)
    return abs(float(z) - (0.5 + 0.25) + (1 - 0.125))


def test_a_reset_keeps_second_order_across_a_jump() -> None:
    for reset, order in ((False, 1), (True, 2)):
        errors = [_switched(steps, reset=reset) for steps in (200, 400, 800)]
        for coarse, fine in pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_dpm2m_is_of_second_order_between_the_ends() -> None:
    """From t = 0.1 to 0.9; at the ends ln(t / (1 - t)) has no bound, which costs a logarithm."""

    def end(steps: int) -> float:
        solver, z = make_solver("dpm2m"), torch.tensor(1.0, dtype=torch.float64)
        for t, t_next in pairwise([0.1 + 0.8 * n / steps for n in range(steps + 1)]):
            z = solver.step(z, math.cos(3 * t) - 2 * z, t, t_next)
        return float(z)

    exact = end(20_000)
    errors = [abs(end(steps) - exact) for steps in (100, 200, 400)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)


def test_dpm2m_is_the_published_formula() -> None:
    """Its form for data predictions: z' = (s'/s) z - a' (exp(-h) - 1) D, a = t, s = 1 - t."""
    generator = torch.Generator().manual_seed(3)
    solver, times = make_solver("dpm2m"), [0.15, 0.3, 0.55, 0.6, 0.95]
    z = torch.randn(6, generator=generator, dtype=torch.float64)
    half_log_snr = [math.log(t / (1 - t)) for t in times]
    earlier: torch.Tensor | None = None
    for n, (t, t_next) in enumerate(pairwise(times)):
        clean = torch.randn(6, generator=generator, dtype=torch.float64)
        h = half_log_snr[n + 1] - half_log_snr[n]
        data = clean
        if earlier is not None:
            r = (half_log_snr[n] - half_log_snr[n - 1]) / h
            data = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * earlier
        expected = (1 - t_next) / (1 - t) * z - t_next * math.expm1(-h) * data
        z = solver.step(z, (clean - z) / (1 - t), t, t_next)
        torch.testing.assert_close(z, expected)
        earlier = clean


def test_dpm2m_ends_in_the_clean_prediction() -> None:
    solver, z = make_solver("dpm2m"), torch.tensor(0.3, dtype=torch.float64)
    for clean, t, t_next in ((2.0, 0.0, 0.25), (1.5, 0.25, 0.5), (-1.0, 0.5, 1.0)):
        z = solver.step(z, (clean - z) / (1 - t), t, t_next)
    assert float(z) == pytest.approx(-1)
