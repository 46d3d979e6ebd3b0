"""DMD2: few-step students by matching distributions, with a second model of the student's images.

With prediction a_T of the guided teacher and a_F of the fake, the model of the student's images,
the gradient of the KL divergence with respect to the student's image x is, up to a factor of t that
the normaliser replaces, a_F - a_T.

Sources: DMD2 (arXiv 2405.14867), Phased DMD (2510.27684), Decoupled DMD (2511.22677).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6


def dmd_gradient(
    image: Float[Tensor, "images ..."],
    teacher: Float[Tensor, "images ..."],
    fake: Float[Tensor, "images ..."],
    *,
    whole_batch: bool = False,
) -> Float[Tensor, "images ..."]:
    """(a_F - a_T) / mean|x - a_T|, the mean per image or over the whole batch."""
    distance = (image - teacher).abs().flatten(1).mean(1)
    if whole_batch:
        distance = distance.mean().expand_as(distance)
    shape = (-1, *[1] * (image.ndim - 1))
    return (fake - teacher) / distance.clamp(min=EPS).view(shape)


def decoupled_gradient(
    image: Tensor,
    fake: Tensor,
    teacher: Tensor,
    teacher_elsewhere: tuple[Tensor, Tensor],
    guidance: float,
) -> Tensor:
    """Decoupled DMD: (a_F - T_cond) at τ, less (g - 1)·(T_cond - T_uncond) at a later τ'.

    `teacher` is unguided at τ, `teacher_elsewhere` its (conditional, unconditional) predictions at
    τ'. Normalised as `dmd_gradient`.
    """
    cond, uncond = teacher_elsewhere
    return dmd_gradient(image, teacher + (guidance - 1) * (cond - uncond), fake)


def matching_loss(
    image: Float[Tensor, "images ..."], gradient: Float[Tensor, "images ..."]
) -> Float[Tensor, " images"]:
    """½·mean‖x - sg(x - grad)‖², whose gradient with respect to x is grad over the values."""
    target = (image - gradient).detach()
    return (image - target).flatten(1).square().mean(1) / 2


def renoise(
    state: Tensor, noise: Tensor, tau: float | Tensor, t: float | Tensor, sigma: float
) -> Tensor:
    """z_τ = α·z' + γ·ε of a student's state z' at t' > τ: the noise that is missing is added."""
    alpha, gamma = renoise_factors(tau, t, sigma)
    return alpha * state + gamma * noise


def renoise_factors(
    tau: float | Tensor, t: float | Tensor, sigma: float
) -> tuple[float | Tensor, float | Tensor]:
    """α = τ/t' and γ with γ² = σ²·((1 - τ)² - α²·(1 - t')²)."""
    alpha = tau / t
    square = (1 - tau) ** 2 - (alpha * (1 - t)) ** 2
    return alpha, sigma * (square.sqrt() if isinstance(square, Tensor) else math.sqrt(square))


def sub_interval_target(
    state: Tensor, noise: Tensor, tau: float | Tensor, t: float | Tensor, sigma: float
) -> tuple[Tensor, float | Tensor]:
    """Target x* of the fake at z_τ when the student stops at t' < 1, and its weight γ²/σ².

    x* = z'/t' - (σ²·τ·s'²/(t'²·γ))·ε with s' = 1 - t'; E[x* | z_τ] = E[x | z_τ], which z'/t' alone
    does not have. Its variance grows as 1/γ² when τ approaches t', hence the weight.
    """
    _, gamma = renoise_factors(tau, t, sigma)
    target = state / t - (sigma**2 * tau * (1 - t) ** 2 / (t**2 * gamma)) * noise
    return target, gamma**2 / sigma**2


def adversarial_losses(
    real: Float[Tensor, " images"], generated: Float[Tensor, " images"]
) -> Float[Tensor, ""]:
    """The discriminator's softplus(-real) + softplus(generated), means over images."""
    softplus = torch.nn.functional.softplus
    return softplus(-real).mean() + softplus(generated).mean()
