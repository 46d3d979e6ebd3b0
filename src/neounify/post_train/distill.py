"""Distillation on the student's own trajectory: fewer steps, no guidance, merged experts.

A student paints without gradient and stops at a state z; a frozen teacher says where the prediction
there should point. In trajectory distillation the teacher takes several guided steps to the
student's next time, and the student's one step must land there; in MOPD (U1.5, arXiv 2609.11929)
the teacher's own velocity at z is the target, and each sample's capability chooses the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""The (guided) velocity of a model: (z, t) → v of z's shape."""


def euler_path(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """The state at the last of `times`, by Euler's steps from z at the first."""
    for t, t_next in pairwise(times):
        z = z + (t_next - t) * velocity(z, t)
    return z


def between(t: float, t_next: float, steps: int) -> list[float]:
    """`steps` + 1 evenly spaced times from t to t_next."""
    return [t + (t_next - t) * index / steps for index in range(steps)] + [t_next]


def trajectory_target(z: Tensor, reached: Tensor, t: float, t_next: float) -> Tensor:
    """x̂* = z + (1 - t)·(z* - z)/(t' - t): the prediction whose Euler step from z lands on z*."""
    return z + (1 - t) / (t_next - t) * (reached - z)


def clean_loss(
    clean: Float[Tensor, "images ..."], target: Float[Tensor, "images ..."]
) -> Float[Tensor, " images"]:
    """mean ‖x̂ - x̂*‖²."""
    return (clean - target).flatten(1).square().mean(1)


def velocity_loss(
    clean: Float[Tensor, "images ..."],
    target: Float[Tensor, "images ..."],
    t: Float[Tensor, " images"],
) -> Float[Tensor, " images"]:
    """mean ‖v_θ - v_m‖² of two predictions of the clean image at one z: ‖x̂ - x̂_m‖²/(1 - t)²."""
    return clean_loss(clean, target) / (1 - t).square()


def stopping_time_parameters(progress: float) -> tuple[float, float]:
    """(α, β) of the Beta distribution that t_e is drawn from, at `progress` 0 to 1 of a run.

    Beta(2 + 3p, 5 - 3p): from the noisy half of the path to its clean half.
    """
    return 2 + 3 * progress, 5 - 3 * progress
