"""The times at which a sampler stops."""

import torch
from jaxtyping import Float
from torch import Tensor


def shift_time(t: Float[Tensor, "*n"], shift: float) -> Float[Tensor, "*n"]:
    """Move times towards noise: with u = 1 - t, u ← S·u / (1 + (S - 1)·u); S = 1 is no shift."""
    u = 1 - t
    return 1 - shift * u / (1 + (shift - 1) * u)


def timesteps(steps: int, shift: float) -> Float[Tensor, " steps+1"]:
    """`steps` + 1 times from 0 (noise) to 1 (data), float32 on the CPU."""
    times = shift_time(torch.linspace(0, 1, steps + 1), shift)
    # Rounding can put the ends just outside, where guidance intervals would miss them.
    times[0], times[-1] = 0, 1
    return times
