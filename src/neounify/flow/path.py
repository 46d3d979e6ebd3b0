"""Path from noise to data: its times, its noise, and the conversions between its quantities.

    z_t = t · x + (1 - t) · σ · ε          ε ~ N(0, 1)
    v   = (x - z_t) / max(1 - t, t_eps)    the velocity that leads to x

All functions take t as a number or as a tensor that broadcasts against z. Training clamps with
the checkpoint's t_eps; sampling with `sampling_t_eps`, unless the request names one.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import FlowConfig

Time = float | Tensor
MAX_SAMPLING_T_EPS = 0.02
"""t_eps of the published samplers."""


# --- times ---


def shift_time(t: Float[Tensor, "*n"], shift: Time) -> Float[Tensor, "*n"]:
    """Move times towards noise: with u = 1 - t, u ← S·u / (1 + (S - 1)·u); S = 1 is no shift."""
    u = 1 - t
    return 1 - shift * u / (1 + (shift - 1) * u)


def timesteps(steps: int, shift: float, first: float = 0.0) -> Float[Tensor, " steps+1"]:
    """`steps` + 1 times from `first`, which is shifted too, to 1 (data), float32 on the CPU."""
    times = shift_time(torch.linspace(first, 1, steps + 1), shift)
    # Rounding can put the ends just outside, where guidance intervals would miss them.
    times[-1] = 1
    if first == 0:
        times[0] = 0
    return times


def cut_times(times: Sequence[float], grid: int) -> list[float]:
    """Times whose 1 - t is cut to a multiple of 1 / `grid`; a smaller 1 - t stays as it is.

    So does every time where `grid` is 0.
    """
    remaining = [(t, int(grid * (1 - t))) for t in times]
    return [1 - count / grid if count else t for t, count in remaining]


def sampling_t_eps(last_t: float) -> float:
    """t_eps for a trajectory whose last step starts at `last_t`.

    No larger than that step's 1 - t: a clamped velocity would end the trajectory short of the
    clean image and leave noise in it, as 80 steps without a shift do at 0.02.
    """
    return min(MAX_SAMPLING_T_EPS, 1 - last_t)


# --- noise ---


def noise_scale(num_tokens: int, flow: FlowConfig, *, cap: bool = True) -> float:
    """σ for an image of `num_tokens` tokens.

    `fixed`: s. `resolution` and `dynamic`: s · sqrt(n / n0). `dynamic_sqrt`: the square
    root of that. Sampling caps it at `noise_scale_max`; training (cap=False) does not.
    """
    scale = flow.noise_scale
    if flow.noise_scale_mode != "fixed":
        scale *= math.sqrt(num_tokens / flow.noise_scale_base_tokens)
    if flow.noise_scale_mode == "dynamic_sqrt":
        scale = math.sqrt(scale)
    return min(scale, flow.noise_scale_max) if cap else scale


def initial_noise(
    shape: Sequence[int], scale: float, generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """One draw of a shape from a CPU generator, times σ; float32."""
    return torch.randn(tuple(shape), generator=generator) * scale


# --- path ---


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
