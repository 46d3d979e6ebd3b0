"""fp8 rows: W ≈ s · q with s_n = max_k |W_nk| / 448 and q in e4m3fn, saturating, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LARGEST = 448
NAN = 0x7F
"""All bits but the sign."""
BITS = 0x07F0 - 0x8000
"""Sign, exponent and fraction of an e4m3 number that was extended to 16 bits and moved by four."""


def quantise_fp8(weight: Float[Tensor, "n k"]) -> tuple[Tensor, Float[Tensor, "n 1"]]:
    """Codes [N, K] in float8_e4m3fn and scales of a weight, or of rows of activations."""
    rows = weight.float()
    scale = rows.abs().amax(dim=1, keepdim=True) / LARGEST
    codes = (rows / scale.where(scale > 0, 1.0)).clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scale


def dequantise_fp8(codes: Tensor, scale: Float[Tensor, "n 1"]) -> Float[Tensor, "n k"]:
    """s · q in float32; a row that holds a NaN is all NaN.

    The bits of e4m3, moved to where bfloat16 has its exponent and fraction, are q · 2^-120. Torch
    converts the type on a CPU at less than a tenth of the speed.
    """
    bits = (codes.view(torch.int8).to(torch.int16) << 4) & BITS
    values = bits.view(torch.bfloat16).float().mul_(2.0**120)
    # In the moved bits NaN is 480, a number like others.
    return values.mul_(scale.masked_fill(rows_with_nan(codes), torch.nan))


def rows_with_nan(codes: Float[Tensor, "n k"]) -> Bool[Tensor, "n 1"]:
    """Whether a row of e4m3 numbers holds a NaN."""
    return (codes.view(torch.int8) & NAN).amax(dim=1, keepdim=True) == NAN
