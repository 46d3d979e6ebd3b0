"""Rotary position embeddings: three axes for attention, two for image patches.

Attention cuts the head dimension d into [t: d/2 | h: d/4 | w: d/4] and rotates
each part on its own, pairing channel i with i + n/2 of a part of width n
(frequencies base^(-2i/n)). Patches pair neighbouring channels (2i, 2i+1).
Angles are always computed in float32.
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """cos and signed sin of every token's angles, [N, 1, d], in the layout of a head."""

    cos: Tensor
    sin: Tensor


@cache
def frequencies(width: int, base: float, device: torch.device) -> Float[Tensor, " half"]:
    """base^(-2i/width) for i = 0 .. width/2 - 1, float32."""
    # The cached tensor must serve training too, whatever mode the first caller is in.
    with torch.inference_mode(False):
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return base**-exponent


def attention_rotation(
    positions: Int[Tensor, "n 3"],
    head_dim: int,
    *,
    theta: float,
    theta_hw: float,
    dtype: torch.dtype,
) -> Rotation:
    """The rotation of N tokens at positions (t, h, w) for heads of `head_dim` channels."""
    parts = []
    for axis, width, base in (
        (0, head_dim // 2, theta),
        (1, head_dim // 4, theta_hw),
        (2, head_dim // 4, theta_hw),
    ):
        angle = positions[:, axis : axis + 1].float() * frequencies(width, base, positions.device)
        parts.append((angle.cos(), angle.sin()))
    # A channel's partner is added with +sin in the second half of a part and -sin in the first.
    cos = torch.cat([c for cos, _ in parts for c in (cos, cos)], dim=-1)
    sin = torch.cat([s for _, sin in parts for s in (-sin, sin)], dim=-1)
    return Rotation(cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1))


def rotate(x: Float[Tensor, "n heads d"], rotation: Rotation) -> Float[Tensor, "n heads d"]:
    """Rotate queries or keys: x · cos + partner(x) · sin."""
    quarter, eighth = x.shape[-1] // 4, x.shape[-1] // 8
    # Not `split`: its Python wrapper costs more than the rest of this function for one token.
    t1, t2, h1, h2, w1, w2 = x.split_with_sizes(
        [quarter, quarter, eighth, eighth, eighth, eighth], dim=-1
    )
    partner = torch.cat([t2, t1, h2, h1, w2, w1], dim=-1)
    return torch.addcmul(x * rotation.cos, partner, rotation.sin)


def rotate_patches(
    x: Float[Tensor, "n channels"],
    rows: Int[Tensor, " n"],
    columns: Int[Tensor, " n"],
    theta: float,
) -> Float[Tensor, "n channels"]:
    """Rotate patch features: first half of the channels by column, second half by row.

    Coordinates are in patch units from the top left of the patch's own image;
    returned in the dtype of `x`.
    """
    freqs = frequencies(x.shape[-1] // 2, theta, x.device)
    angle = torch.cat([columns[:, None].float() * freqs, rows[:, None].float() * freqs], dim=-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
