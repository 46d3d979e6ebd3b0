"""int8 rows: W ≈ s · q with s_n = max_k |W_nk| / 127 and q = clamp(round(W / s), ±127), of W · H.

Rounding is half to even, all in float32. `group` channels are rotated together, 1 means no
rotation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from neounify.quant.rotation import rotate_groups

LARGEST = 127


def quantise_int8(
    weight: Float[Tensor, "n k"], group: int = 1
) -> tuple[Int8[Tensor, "n k"], Float[Tensor, "n 1"]]:
    """Codes and scales of a weight, or of rows of activations."""
    rows = rotate_groups(weight, group) if group > 1 else weight.float()
    scale = rows.abs().amax(dim=1, keepdim=True) / LARGEST
    # A row of zeros has the scale 0 and codes 0.
    codes = (rows / scale.where(scale > 0, 1.0)).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), scale


def dequantise_int8(
    codes: Int8[Tensor, "n k"], scale: Float[Tensor, "n 1"]
) -> Float[Tensor, "n k"]:
    """s · q in float32, rotated as it was quantised."""
    return codes.float() * scale
