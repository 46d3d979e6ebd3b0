"""Losses of the post-training methods against closed forms and toys with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from neounify.flow.sde import gaussian_step
from neounify.post_train.advantage import group_advantages, informative
from neounify.post_train.distill import (
    between,
    clean_loss,
    euler_path,
    trajectory_target,
)
from neounify.post_train.dmd2 import (
    decoupled_gradient,
    dmd_gradient,
    matching_loss,
    renoise,
    sub_interval_target,
)
from neounify.post_train.dpo import best_and_worst, dpo_loss, prediction_error
from neounify.post_train.grpo import policy_terms
from neounify.post_train.mopd import velocity_loss
from neounify.post_train.nft import nft_loss, old_decay, positive_share

MEAN, VARIANCE = 0.3, 0.25
NAN = float("nan")


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _posterior(z: Tensor, t: float | Tensor, sigma: float, mean: float, variance: float) -> Tensor:
    """E[x | z_t] for x ~ N(mean, variance)."""
    gain = t * variance / (t**2 * variance + (1 - t) ** 2 * sigma**2)
    return mean + gain * (z - t * mean)


# --- advantages ---


def test_advantages_of_a_group_sum_to_zero() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    for scope in ("iteration", "group"):
        advantages = group_advantages(rewards, scope)
        torch.testing.assert_close(advantages.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
        assert not advantages[1].any()
    assert informative(rewards).tolist() == [True, False, True]
    std = float(rewards.std(correction=0))
    expected = (1 - 0.25) / (std + 1e-4)
    assert float(group_advantages(rewards)[2, 3]) == pytest.approx(expected, rel=1e-5)


def test_samples_without_a_reward_have_no_advantage() -> None:
    rewards = torch.tensor([[0.0, NAN, 1.0], [NAN, NAN, 0.5], [NAN, NAN, NAN]])
    advantages = group_advantages(rewards, "group")
    assert advantages[0, 1] == 0
    assert not advantages[1:].any()
    torch.testing.assert_close(advantages[0, 2], torch.tensor(1.0), atol=1e-3, rtol=0)


def test_advantages_are_bounded() -> None:
    rewards = torch.zeros(1, 64)
    rewards[0, 0] = 1
    assert float(group_advantages(rewards, "group").max()) == 5.0


# --- Flow-GRPO ---


@pytest.mark.parametrize("guard", [False, True])
def test_the_first_update_is_the_policy_gradient(guard: bool) -> None:
    step = gaussian_step("cps", 0.7, [0.0, 0.25, 0.5, 0.75, 1.0], 1, 3.0)
    old, noise, advantage = _draw(0, 6, 48), _draw(1, 6, 48), _draw(2, 6)
    clean = old.clone().requires_grad_()
    terms = policy_terms(step, clean, old, noise, advantage, clip=1e-5, guard=guard)
    assert float(terms.log_ratio.abs().max()) <= 1e-6
    assert not terms.clipped.any()
    terms.loss.sum().backward()
    scale = step.q / (step.sigma if guard else step.w)
    torch.testing.assert_close(clean.grad, -advantage[:, None] * scale * noise / 48)


def _gradient(
    shift: float, advantage: float, clip: float = 1.0, kl_mask: float | None = None
) -> float:
    """Size of the gradient where the prediction moved by `shift` along the noise, as |∂loss/∂x̂|."""
    step = gaussian_step("cps", 0.7, [0.0, 0.25, 0.5, 0.75, 1.0], 1, 1.0)
    old, noise = _draw(0, 1, 48), _draw(1, 1, 48)
    clean = (old + shift * noise).requires_grad_()
    terms = policy_terms(
        step,
        clean,
        old,
        noise,
        torch.tensor([advantage], dtype=torch.float64),
        clip=clip,
        kl_mask=kl_mask,
    )
    terms.loss.sum().backward()
    assert clean.grad is not None
    assert bool(terms.clipped) == (float(clean.grad.abs().sum()) == 0)
    return float(clean.grad.abs().sum())


@pytest.mark.parametrize("options", [{"clip": 1e-4}, {"kl_mask": 1e-5}])
def test_the_clip_takes_gradients_away_on_one_side_only(options: dict[str, float]) -> None:
    assert _gradient(0.1, 1.0, **options) == 0  # A > 0, ρ > 1 + c
    assert _gradient(-0.1, -1.0, **options) == 0  # A < 0, ρ < 1 - c
    assert _gradient(-0.1, 1.0, **options) > 0
    assert _gradient(0.1, -1.0, **options) > 0
    assert _gradient(1e-6, 1.0, **options) > 0


# --- NFT, DPO ---


def test_nft_with_certain_success_is_the_plain_loss() -> None:
    clean, old, image = (_draw(seed, 4, 48) for seed in range(3))
    loss = nft_loss(clean, old, image, torch.ones(4), 1.0)
    distance = (clean - image).abs().mean(1)
    torch.testing.assert_close(loss, (clean - image).square().mean(1) / distance)


def test_nft_without_an_advantage_does_not_move() -> None:
    old, image = _draw(0, 4, 48), _draw(1, 4, 48)
    clean = old.clone().requires_grad_()
    nft_loss(clean, old, image, positive_share(torch.zeros(4), 5.0), 0.1).sum().backward()
    torch.testing.assert_close(clean.grad, torch.zeros_like(old), atol=1e-9, rtol=0)
    assert positive_share(torch.tensor([10.0, -10.0]), 5.0).tolist() == [1.0, 0.0]
    assert [old_decay(i, 1e-3, 0.5) for i in (0, 100, 9000)] == [0.0, 0.1, 0.5]


def test_dpo_prefers_the_better_image() -> None:
    t = torch.tensor([0.5, 0.99], dtype=torch.float64)
    image, clean = _draw(0, 2, 48), _draw(1, 2, 48)
    error = prediction_error(clean, image, t)
    square = (clean - image).square().mean(1)
    torch.testing.assert_close(error, square / torch.tensor([0.25, 0.05**2]).double())
    win = error.clone().requires_grad_()
    lose = error.clone().requires_grad_()
    loss, _ = dpo_loss((win, lose), (error, error), 2.0)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2)).double())
    loss.sum().backward()
    assert win.grad is not None
    torch.testing.assert_close(win.grad, torch.full((2,), 0.5).double())
    torch.testing.assert_close(lose.grad, -win.grad)
    best, worst = best_and_worst(torch.tensor([[NAN, 0.2, 0.9], [0.5, NAN, 0.1]]))
    assert (best.tolist(), worst.tolist()) == ([2, 0], [1, 2])


# --- DMD2 ---


@pytest.mark.parametrize("start", [(0.0, 1.0), (2.0, 0.1), (-1.0, 2.0)])
def test_dmd_finds_the_teachers_distribution(start: tuple[float, float]) -> None:
    """T = N(0.3, 0.25), student a + b·ε, exact predictions, σ 3: to (0.300, 0.500)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start)
    optimizer = torch.optim.SGD([a, b], lr=1e-2)
    late: list[tuple[float, float]] = []
    for step in range(2000):
        draws = torch.randn(3, 256, 1, dtype=torch.float64, generator=generator)
        tau = torch.rand(256, 1, dtype=torch.float64, generator=generator) * 0.96 + 0.02
        image = a + b * draws[0]
        z = (tau * image + (1 - tau) * 3 * draws[1]).detach()
        teacher = _posterior(z, tau, 3, MEAN, VARIANCE)
        fake = _posterior(z, tau, 3, a.item(), b.item() ** 2)
        gradient = dmd_gradient(image, teacher, fake, whole_batch=True)
        optimizer.zero_grad()
        matching_loss(image, gradient.detach()).mean().backward()
        optimizer.step()
        if step >= 1900:
            late.append((a.item(), abs(b.item())))
    mean, deviation = (sum(values) / len(values) for values in zip(*late, strict=True))
    assert mean == pytest.approx(0.3, abs=0.005)
    assert deviation == pytest.approx(0.5, abs=0.005)


def test_dmd_does_not_depend_on_the_unit_of_pixels() -> None:
    image, teacher, fake = (_draw(seed, 3, 48) for seed in range(3))
    gradient = dmd_gradient(image, teacher, fake)
    torch.testing.assert_close(dmd_gradient(7 * image, 7 * teacher, 7 * fake), gradient)
    probe = image.clone().requires_grad_()
    matching_loss(probe, gradient).sum().backward()
    torch.testing.assert_close(probe.grad, gradient / 48, rtol=1e-5, atol=1e-9)


def test_decoupled_dmd_without_guidance_is_dmd() -> None:
    image, teacher, fake, cond, uncond = (_draw(seed, 3, 48) for seed in range(5))
    plain = dmd_gradient(image, teacher, fake)
    torch.testing.assert_close(decoupled_gradient(image, fake, teacher, (cond, uncond), 1.0), plain)
    guided = decoupled_gradient(image, fake, cond, (cond, uncond), 4.0)
    torch.testing.assert_close(guided, dmd_gradient(image, uncond + 4 * (cond - uncond), fake))


def test_targets_inside_an_interval_are_unbiased() -> None:
    """Regression of x* on z_τ gives the posterior mean; that of z'/t' does not."""
    draws, t, tau, sigma = 400_000, 0.6, 0.25, 3.0
    x = MEAN + VARIANCE**0.5 * _draw(0, draws)
    state = t * x + (1 - t) * sigma * _draw(1, draws)
    noise = _draw(2, draws)
    z = renoise(state, noise, tau, t, sigma)
    torch.testing.assert_close(
        z.var(),
        torch.tensor(tau**2 * VARIANCE + (1 - tau) ** 2 * sigma**2).double(),
        rtol=0.01,
        atol=0,
    )
    target, weight = sub_interval_target(state, noise, tau, t, sigma)
    assert 0 < float(weight) < 1

    def slope(values: Tensor) -> tuple[float, float]:
        centred = z - z.mean()
        value = float((centred * (values - values.mean())).sum() / centred.square().sum())
        rest = values - values.mean() - value * centred
        return value, float(rest.std() / (z.std() * math.sqrt(draws)))

    exact = tau * VARIANCE / (tau**2 * VARIANCE + (1 - tau) ** 2 * sigma**2)
    assert exact == pytest.approx(0.0123, abs=1e-4)
    measured, error = slope(target)
    assert measured == pytest.approx(exact, abs=3 * error)
    assert slope(state / t)[0] == pytest.approx(0.209, abs=0.005)


# --- distillation ---


def _toy_velocity(z: Tensor, t: float) -> Tensor:
    return (_posterior(z, t, 3.0, MEAN, VARIANCE) - z) / (1 - t)


def test_a_teacher_equal_to_the_student_teaches_nothing() -> None:
    z, t, t_next = _draw(0, 4, 12), 0.25, 0.5
    clean = _posterior(z, t, 3.0, MEAN, VARIANCE)
    reached = euler_path(_toy_velocity, z, between(t, t_next, 1))
    target = trajectory_target(z, reached, t, t_next)
    torch.testing.assert_close(
        clean_loss(clean, target), torch.zeros(4).double(), atol=1e-12, rtol=0
    )
    assert not velocity_loss(clean, clean, torch.full((4,), t)).any()


def test_many_steps_of_the_teacher_reach_the_exact_flow_map() -> None:
    """The ODE of a Gaussian keeps (z - t·m) / std(z_t) constant."""
    z, t, t_next = 3 * _draw(0, 4, 12), 0.25, 0.5

    def std(time: float) -> float:
        return math.sqrt(time**2 * VARIANCE + (1 - time) ** 2 * 9)

    exact = t_next * MEAN + (z - t * MEAN) * std(t_next) / std(t)
    target = trajectory_target(z, exact, t, t_next)
    errors = [
        float(
            (
                trajectory_target(
                    z, euler_path(_toy_velocity, z, between(t, t_next, steps)), t, t_next
                )
                - target
            )
            .abs()
            .max()
        )
        for steps in (16, 64, 256)
    ]
    assert errors[2] < 0.01
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5
    assert between(0.0, 0.5, 2) == [0.0, 0.25, 0.5]
