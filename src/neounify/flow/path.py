"""The straight path from noise to data, and the conversions between its quantities.

    z_t = t · x + (1 - t) · σ · ε          ε ~ N(0, 1)
    v   = (x - z_t) / max(1 - t, t_eps)    the velocity that leads to x

All functions take t as a number or as a tensor that broadcasts against z. Training clamps with
the checkpoint's t_eps; sampling with `sampling_t_eps`, unless the request names one.
"""

import torch
from torch import Tensor

Time = float | Tensor
MAX_SAMPLING_T_EPS = 0.02
"""t_eps of the published samplers."""


def sampling_t_eps(last_t: float) -> float:
    """t_eps for a trajectory whose last step starts at `last_t`.

    No larger than that step's 1 - t: a clamped velocity would end the trajectory short of the
    clean image and leave noise in it, as 80 steps without a shift do at 0.02.
    """
    return min(MAX_SAMPLING_T_EPS, 1 - last_t)


def noisy(clean: Tensor, noise: Tensor, t: Time, noise_scale: Time) -> Tensor:
    """z_t: the point at time t between scaled noise and the clean image."""
    return t * clean + (1 - t) * noise_scale * noise


def velocity(clean: Tensor, z: Tensor, t: Time, t_eps: float) -> Tensor:
    """The velocity at z that points at the (predicted) clean image."""
    return (clean - z) / _remaining(t, t_eps)


def clean_from_velocity(v: Tensor, z: Tensor, t: Time, t_eps: float) -> Tensor:
    """The clean image a velocity points at; the inverse of `velocity`."""
    return z + v * _remaining(t, t_eps)


def _remaining(t: Time, t_eps: float) -> Time:
    if isinstance(t, Tensor):
        return torch.clamp(1 - t, min=t_eps)
    return max(1 - t, t_eps)
