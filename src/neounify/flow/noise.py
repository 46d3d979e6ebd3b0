"""Noise scale σ, which grows with the number of image tokens, and initial noise."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import FlowConfig


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
) -> Float[Tensor, "b c h w"]:
    """One draw of [B, C, H, W] from a CPU generator, times σ; float32."""
    return torch.randn(tuple(shape), generator=generator) * scale
