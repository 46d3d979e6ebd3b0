"""The integrators, on equations whose solution is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from neounify.errors import RequestError
from neounify.flow.path import shift_time, timesteps
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
    return abs(float(z) - _solution(1))


def _solution(t: float) -> float:
    """z(t) of dz/dt = cos(3t) - 2z from z(0) = 1."""
    particular = (2 * math.cos(3 * t) + 3 * math.sin(3 * t)) / 13
    return particular + (1 - 2 / 13) * math.exp(-2 * t)


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
    with pytest.raises(RequestError, match=r"'heun' is unknown; known: euler, ab2, dpm2m, unipc"):
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


@pytest.mark.parametrize(("name", "order"), [("dpm2m", 2), ("unipc", 3)])
def test_order_between_the_ends(name: str, order: int) -> None:
    """From t = 0.1 to 0.9, where ln(t / (1 - t)) is smooth: the corrector brings one order more."""

    def end(steps: int) -> float:
        solver = make_solver(name)
        z = torch.tensor(_solution(0.1), dtype=torch.float64)
        for t, t_next in pairwise([0.1 + 0.8 * n / steps for n in range(steps + 1)]):
            z = solver.step(z, math.cos(3 * t) - 2 * z, t, t_next)
        return float(z)

    errors = [abs(end(steps) - _solution(0.9)) for steps in (100, 200, 400, 800)]
    # A corrector has no order of its own in the first step, which few steps still show.
    for coarse, fine in pairwise(errors[order - 2 :]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


MEAN, SPREAD = 0.7, 0.4
"""Of a normal distribution of values x, whose path from noise is known in closed form."""


def _spread(t: float) -> float:
    """Standard deviation of z_t = t·x + (1 - t)·ε."""
    return math.hypot(t * SPREAD, 1 - t)


def _gaussian_error(name: str, steps: int, shift: float, first: float) -> float:
    """From z_t = t·μ - 1.3·σ_t, which stays so along dz/dt = (E[x | z] - z) / (1 - t), to t = 1."""
    times = timesteps(steps, shift, first).tolist()
    solver = make_solver(name)
    z = torch.tensor(times[0] * MEAN - 1.3 * _spread(times[0]), dtype=torch.float64)
    for t, t_next in pairwise(times):
        clean = MEAN + t * SPREAD**2 * (z - t * MEAN) / _spread(t) ** 2
        z = solver.step(z, (clean - z) / (1 - t), t, t_next)
    return abs(float(z) - (MEAN - 1.3 * SPREAD))


@pytest.mark.parametrize(("shift", "steps"), [(1.0, 200), (3.0, 400)])
@pytest.mark.parametrize("first", [0.0, 0.001])
def test_unipc_is_of_second_order_over_a_whole_trajectory(
    shift: float, steps: int, first: float
) -> None:
    """Its first and last step are of first order, and h has no bound there."""
    errors = [_gaussian_error("unipc", n * steps, shift, first) for n in (1, 2, 4)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("first", [0.0, 0.001])
def test_dpm2m_comes_near_second_order_over_a_whole_trajectory(first: float) -> None:
    """h has no bound at the ends, which costs a logarithm of the number of steps."""
    errors = [_gaussian_error("dpm2m", steps, 1.0, first) for steps in (100, 200, 400, 800)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == sorted(orders)
    assert 1.65 < orders[0] < orders[-1] < 2


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


@pytest.mark.parametrize("first", [0.0, 0.02])
def test_unipc_is_the_published_formula(first: float) -> None:
    """Predictor and corrector in σ = 1 - t, of which each solves its own equations for ρ."""
    generator = torch.Generator().manual_seed(3)
    times = [first, 0.1, 0.3, 0.55, 0.6, 0.95, 1.0]
    sigma = [1 - t for t in times]
    lam = [math.log(t / (1 - t)) if 0 < t < 1 else math.copysign(math.inf, t - 0.5) for t in times]
    solver, steps = make_solver("unipc"), len(times) - 1
    z = torch.randn(6, generator=generator, dtype=torch.float64)
    m: list[torch.Tensor] = []
    y, order = z, 0
    for k in range(steps):
        m.append(torch.randn(6, generator=generator, dtype=torch.float64))
        predicted = z
        if k:
            h = lam[k] - lam[k - 1]
            e = math.expm1(-h)
            c = (m[k] - m[k - 1]) / 2
            if order == 2:
                r = (lam[k - 2] - lam[k - 1]) / h
                phi2 = e / -h - 1
                phi3 = phi2 / -h - 1 / 2
                rows = torch.tensor([[1, 1], [r, 1]], dtype=torch.float64)
                right = torch.tensor([phi2 / e, 2 * phi3 / e], dtype=torch.float64)
                rho = torch.linalg.solve(rows, right)
                c = rho[0] * (m[k - 2] - m[k - 1]) / r + rho[1] * (m[k] - m[k - 1])
            y = sigma[k] / sigma[k - 1] * y - (1 - sigma[k]) * e * (m[k - 1] + c)
        order = min(2, steps - k, k + 1, 1 if k and lam[k - 1] == -math.inf else 2)
        e = math.expm1(-(lam[k + 1] - lam[k]))
        r = (lam[k - 1] - lam[k]) / (lam[k + 1] - lam[k]) if order == 2 else 1
        c = (m[k - 1] - m[k]) / r / 2 if order == 2 else 0 * y
        z = sigma[k + 1] / sigma[k] * y - (1 - sigma[k + 1]) * e * (m[k] + c)
        actual = solver.step(predicted, (m[k] - predicted) / sigma[k], times[k], times[k + 1])
        torch.testing.assert_close(actual, z)
    torch.testing.assert_close(z, m[-1])


def test_unipc_takes_first_steps_after_a_reset() -> None:
    """Nothing is corrected or extrapolated across it: the step is Euler's."""
    solver = make_solver("unipc")
    z = solver.step(torch.tensor(0.3), torch.tensor(1.0), 0.1, 0.3)
    z = solver.step(z, torch.tensor(2.0), 0.3, 0.5)
    solver.reset()
    assert float(solver.step(z, torch.tensor(-1.0), 0.5, 0.6)) == pytest.approx(float(z) - 0.1)


def test_the_published_form_of_dpm2m_is_the_same_but_for_its_rounding() -> None:
    generator = torch.Generator().manual_seed(5)
    times = timesteps(8, 3.0, 0.001).tolist()
    for dtype, least, most in ((torch.float64, 0.0, 1e-11), (torch.float32, 1e-6, 1e-3)):
        ends = []
        z = torch.randn(64, generator=generator, dtype=dtype)
        for published in (False, True):
            solver, moved = make_solver("dpm2m", published=published), z
            for t, t_next in pairwise(times):
                moved = solver.step(moved, torch.tanh(moved) + t, t, t_next)
            ends.append(moved)
        error = float((ends[1] - ends[0]).abs().max() / ends[0].abs().max())
        assert least <= error <= most


@pytest.mark.parametrize("name", ["dpm2m", "unipc"])
@pytest.mark.parametrize("steps", [1, 2])
def test_one_or_two_steps_are_of_first_order(name: str, steps: int) -> None:
    """The second step is the last: it ends in its own x̂."""
    solver, z = make_solver(name), torch.tensor(1.0, dtype=torch.float64)
    times = timesteps(steps, 3.0, 0.001).tolist()
    for n, (t, t_next) in enumerate(pairwise(times)):
        before = z
        z = solver.step(z, (0.25 + n - z) / (1 - t), t, t_next)
        if t_next < 1:
            wanted = before + (t_next - t) * (0.25 - before) / (1 - t)
            torch.testing.assert_close(z, wanted)
    assert float(z) == pytest.approx(0.25 + steps - 1)


@pytest.mark.parametrize("name", ["dpm2m", "unipc"])
def test_it_ends_in_the_clean_prediction(name: str) -> None:
    solver, z = make_solver(name), torch.tensor(0.3, dtype=torch.float64)
    for clean, t, t_next in ((2.0, 0.0, 0.25), (1.5, 0.25, 0.5), (-1.0, 0.5, 1.0)):
        z = solver.step(z, (clean - z) / (1 - t), t, t_next)
    assert float(z) == pytest.approx(-1)
