"""The straight path from noise to data, and the conversions between its quantities.

    z_t = t · x + (1 - t) · σ · ε          ε ~ N(0, 1)
    v   = (x - z_t) / max(1 - t, t_eps)    the velocity that leads to x

All functions take t as a number or as a tensor that broadcasts against z.
"""

import torch
from torch import Tensor

Time = float | Tensor


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
