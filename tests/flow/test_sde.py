"""Stochastic steps against closed forms: an exact Gaussian toy, torch's Normal, known moments."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from neounify.errors import ConfigError
from neounify.flow.sampling import Euler
from neounify.flow.sde import (
    STEP_KINDS,
    StepKind,
    StochasticSolver,
    check_step_kind,
    gaussian_step,
)

MEAN, VARIANCE = 0.3, 0.25
"""The data of the toy: values drawn from N(0.3, 0.25), whose best prediction is known."""


def _uniform(steps: int) -> list[float]:
    return [index / steps for index in range(steps + 1)]


def _shifted(steps: int, shift: float) -> list[float]:
    noise = [1 - t for t in _uniform(steps)]
    return [1 - shift * u / (1 + (shift - 1) * u) for u in noise]


def _gain(t: float, sigma: float) -> float:
    """x̂ = m + gain·(z - t·m)."""
    return t * VARIANCE / (t**2 * VARIANCE + (1 - t) ** 2 * sigma**2)


def _moments(kind: StepKind, eta: float, steps: int, sigma: float) -> tuple[float, float]:
    """Mean and variance at t = 1: every step is affine, so they follow a recursion."""
    times = _uniform(steps)
    mean, variance = 0.0, sigma**2
    for index, t in enumerate(times[:-1]):
        step = gaussian_step(kind, eta, times, index, sigma)
        gain = _gain(t, sigma)
        slope = step.q * gain + step.p
        mean = step.q * (MEAN - gain * t * MEAN) + slope * mean
        variance = slope**2 * variance + step.w**2
    return mean, variance


TOY = {
    ("ode", 0.0): {1: (-0.071, -0.018, -0.0046, -0.0012), 8: (-0.29, -0.082, -0.021, -0.0053)},
    ("precise", 1.0): {1: (-0.11, -0.029, -0.0075, -0.0019), 8: (-0.37, -0.13, -0.037, -0.0097)},
    ("flow", 0.7): {1: (-0.011, 0.0036, 0.0041, 0.0027), 8: (-0.15, -0.039, -0.0091, -0.0017)},
    ("cps", 0.7): {1: (-0.34, -0.30, -0.28, -0.28), 8: (-0.48, -0.35, -0.30, -0.29)},
}
"""Relative errors of the final variance after 40, 160, 640 and 2560 steps, by σ."""


@pytest.mark.parametrize(("kind", "eta"), TOY)
def test_final_moments_of_the_toy(kind: StepKind, eta: float) -> None:
    for sigma, row in TOY[kind, eta].items():
        errors = []
        for steps, expected in zip((40, 160, 640, 2560), row, strict=True):
            mean, variance = _moments(kind, eta, steps, sigma)
            assert mean == pytest.approx(MEAN, abs=1e-14)
            errors.append(variance / VARIANCE - 1)
            digits = 10.0 ** (math.floor(math.log10(abs(expected))) - 1)
            assert errors[-1] == pytest.approx(expected, abs=digits)
        if kind in ("ode", "precise"):  # first order: a quarter of the step, a quarter of the error
            assert 3.8 < errors[2] / errors[3] < 4.2
    if kind == "cps":  # does not converge
        assert _moments(kind, eta, 2560, 1)[1] / VARIANCE - 1 == pytest.approx(-0.28, abs=0.01)


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", STEP_KINDS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_every_kind_is_eulers_step(kind: StepKind, shift: float) -> None:
    times = _shifted(10, shift)
    z, clean = _draw(0, 4, 12), _draw(1, 4, 12)
    for index, (t, t_next) in enumerate(pairwise(times)):
        step = gaussian_step(kind, 0.0, times, index, 3.0)
        assert not step.is_random
        euler = Euler().step(z, (clean - z) / (1 - t), t, t_next)
        torch.testing.assert_close(step.mean(z, clean), euler, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", STEP_KINDS)
def test_the_last_step_has_no_noise(kind: StepKind) -> None:
    times = _uniform(10)
    step = gaussian_step(kind, 0.7, times, 9, 3.0)
    z, clean = _draw(0, 4, 12), _draw(1, 4, 12)
    assert step.w == 0
    torch.testing.assert_close(step.mean(z, clean), clean, rtol=0, atol=1e-12)


def _published_flow(
    x: Tensor, v: Tensor, u: float, u_next: float, u_max: float, eta: float
) -> tuple[Tensor, float]:
    """Flow-GRPO's step as its paper has it: time u = 1 - t, velocity towards noise, σ = 1."""
    deviation = eta * math.sqrt(u / (1 - (u_max if u == 1 else u)))
    h = u_next - u
    mean = x * (1 + deviation**2 / (2 * u) * h) + v * (1 + deviation**2 * (1 - u) / (2 * u)) * h
    return mean, deviation * math.sqrt(-h)


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_flow_is_the_published_form(sigma: float) -> None:
    times = _shifted(10, 3.0)
    z, clean = _draw(0, 4, 12), _draw(1, 4, 12)
    for index in range(9):
        t, t_next = times[index], times[index + 1]
        step = gaussian_step("flow", 0.7, times, index, sigma)
        velocity = -(clean - z) / (1 - t) / sigma
        mean, w = _published_flow(z / sigma, velocity, 1 - t, 1 - t_next, 1 - times[1], 0.7)
        torch.testing.assert_close(step.mean(z, clean), mean * sigma, rtol=1e-12, atol=1e-12)
        assert step.w == pytest.approx(w * sigma, rel=1e-12)


def test_two_half_steps_of_precise_are_one_whole_step() -> None:
    """For one frozen x̂ and n̂ the factors κ multiply."""
    whole, halves = [0.2, 0.6, 1.0], [0.2, 0.35, 0.6, 1.0]

    def kappa(times: list[float], index: int) -> float:
        t, t_next = times[index], times[index + 1]
        step = gaussian_step("precise", 1.3, times, index, 1.0)
        return step.p * (1 - t) / (1 - t_next)

    assert kappa(halves, 0) * kappa(halves, 1) == pytest.approx(kappa(whole, 0), rel=1e-12)


RANDOM = [("cps", 0.7), ("precise", 1.5), ("flow", 0.7)]


@pytest.mark.parametrize(("kind", "eta"), RANDOM)
@pytest.mark.parametrize("index", [0, 3])
def test_rescaling_pixels_and_sigma(kind: StepKind, eta: float, index: int) -> None:
    times = _uniform(8)
    one = gaussian_step(kind, eta, times, index, 3.0)
    seven = gaussian_step(kind, eta, times, index, 21.0)
    z, clean, old, noise = (_draw(seed, 4, 12) for seed in range(4))
    torch.testing.assert_close(seven.mean(7 * z, 7 * clean), 7 * one.mean(z, clean))
    assert seven.w == pytest.approx(7 * one.w)
    for measure in ("log_ratio", "guarded_log_ratio"):
        torch.testing.assert_close(
            getattr(seven, measure)(noise, 7 * clean, 7 * old),
            getattr(one, measure)(noise, clean, old),
        )
    torch.testing.assert_close(seven.divergence(7 * clean, 7 * old), one.divergence(clean, old))


@pytest.mark.parametrize(("kind", "eta"), RANDOM)
def test_log_probabilities(kind: StepKind, eta: float) -> None:
    times = _uniform(8)
    step = gaussian_step(kind, eta, times, 2, 3.0)
    z, clean, old, noise = (_draw(seed, 5, 48) for seed in range(4))
    z_next = step.sample(z, old, noise)
    normal = torch.distributions.Normal(step.mean(z, clean), step.w)
    log_prob = step.log_prob(z_next, z, clean)
    torch.testing.assert_close(log_prob, normal.log_prob(z_next).mean(1))
    torch.testing.assert_close(
        step.log_ratio(noise, clean, old), log_prob - step.log_prob(z_next, z, old)
    )


@pytest.mark.parametrize(("kind", "eta"), RANDOM)
def test_moments_of_the_log_ratio(kind: StepKind, eta: float) -> None:
    """Mean -b and deviation √(2b/D); with the guard, mean 0 and deviation q‖Δx̂‖/(σD)."""
    draws, values = 200_000, 48
    step = gaussian_step(kind, eta, _uniform(8), 2, 3.0)
    old, clean = _draw(0, 1, values), _draw(0, 1, values) + 0.1 * _draw(1, 1, values)
    noise = _draw(2, draws, values)
    b = float(step.divergence(clean, old))
    norm = float((clean - old).norm())
    expected = {
        "log_ratio": (-b, math.sqrt(2 * b / values)),
        "guarded_log_ratio": (0.0, step.q * norm / (step.sigma * values)),
    }
    for name, (mean, deviation) in expected.items():
        ratios = getattr(step, name)(noise, clean, old)
        assert float(ratios.mean()) == pytest.approx(mean, abs=3 * deviation / math.sqrt(draws))
        error = 3 * deviation / math.sqrt(2 * draws)
        assert float(ratios.std()) == pytest.approx(deviation, abs=error)


def test_the_policy_gradient_of_one_step() -> None:
    """x̂ = θ, D = 1, r = -(z' - a)²: the mean gradient of -r·ℓ is 2q(μ - a), with a baseline too."""
    draws, target = 400_000, 1.0
    step = gaussian_step("cps", 0.7, _uniform(8), 3, 3.0)
    z, theta = torch.full((1, 1), 0.4), torch.tensor(0.2, dtype=torch.float64)
    noise = _draw(0, draws, 1)
    mean = step.q * theta + step.p * 0.4
    reward = -(mean + step.w * noise - target).square()
    score = (step.q / step.w) * noise  # ∂ℓ/∂θ
    for baseline in (0.0, float(reward.mean())):
        gradient = -(reward - baseline) * score
        error = 3 * float(gradient.std()) / math.sqrt(draws)
        assert float(gradient.mean()) == pytest.approx(
            2 * step.q * (float(mean) - target), abs=error
        )
    clean = theta.float().expand(1, 1).clone().requires_grad_()
    z_next = step.sample(z, clean.detach(), noise[:1].float())
    step.log_prob(z_next, z, clean).sum().backward()
    assert clean.grad is not None
    assert float(clean.grad) == pytest.approx(float(score[0]), rel=1e-4)


def test_a_solver_is_random_inside_its_window_only() -> None:
    times = _shifted(8, 3.0)
    noise = {index: _draw(index, 6, 12) for index in range(8)}
    solver = StochasticSolver(
        "cps", 0.7, times, 3.0, random_steps=(2, 3), sample_noise=lambda index: noise[index]
    )
    z = 3 * _draw(20, 6, 12)
    for index, (t, t_next) in enumerate(pairwise(times)):
        clean = _draw(30 + index, 6, 12)
        expected = gaussian_step(
            "cps" if index in (2, 3) else "ode", 0.7, times, index, 3.0
        ).sample(z, clean, noise[index])
        z_next = solver.step(z, (clean - z) / (1 - t), t, t_next)
        torch.testing.assert_close(z_next, expected, rtol=1e-12, atol=1e-12)
        if index in (2, 3):
            torch.testing.assert_close(solver.record[index].clean, clean)
            torch.testing.assert_close(solver.record[index].z, z)
        z = z_next
    assert sorted(solver.record) == [2, 3]


@pytest.mark.parametrize(
    ("kind", "eta", "message"),
    [
        ("sde", 0.5, "step kind 'sde' is unknown; known: ode, cps, precise, flow"),
        ("cps", 1.5, "eta of cps steps must be from 0 to 1, got 1.5"),
        ("flow", float("nan"), "eta of flow steps must be from 0 to 4, got nan"),
    ],
)
def test_settings_out_of_range(kind: str, eta: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_step_kind(kind, eta)


@pytest.mark.parametrize("method", ["log_prob", "divergence"])
def test_a_deterministic_step_has_no_density(method: str) -> None:
    step = gaussian_step("ode", 0.0, _uniform(4), 1, 1.0)
    with pytest.raises(ValueError, match="no density"):
        getattr(step, method)(*(_draw(seed, 1, 3) for seed in range(2 + (method == "log_prob"))))
