"""4-bit codes that decode to int8 rows: Ŵ = s_channel · clamp(round(level[q] · s_rel), ±127).

W · H is stored: 16 sorted levels of a tensor (`codebook`), s_rel [N, K / group] in e4m3 for groups
of 16 channels, s_channel [N] in float32, two codes per byte [N, K / 2] with element 2i in the low
half. Without a codebook the levels are q - 8. Rounding is half to even, in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from neounify.quant.fp8 import rows_with_nan
from neounify.quant.int8 import LARGEST
from neounify.quant.rotation import rotate_groups

LEVELS = 16
GROUP = 16
FIT_SAMPLES, FIT_STEPS = 2**18, 30
REFINEMENTS = 2
"""Alternations of codes and scales; a third lowers the error by less than 0.1 %."""
PIECE = 2**22
"""Elements that are quantised at a time, which bounds what intermediate results take."""
TINY = 1e-12


def quantise_w4(
    weight: Float[Tensor, "n k"], rotated: int
) -> tuple[Int8[Tensor, "n half"], Tensor, Float[Tensor, " n"], Float[Tensor, " 16"]]:
    """Codes, s_rel, s_channel and codebook of a weight; `rotated` channels rotate together."""
    step = max(1, PIECE // weight.shape[1])
    codebook = fit_codebook(weight, rotated)
    pieces = [_quantise_rows(rows, rotated, codebook) for rows in weight.split(step)]
    codes, relative, channel = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return codes, relative, channel, codebook


def fit_codebook(weight: Float[Tensor, "n k"], rotated: int) -> Float[Tensor, " 16"]:
    """16 sorted levels for values of groups divided by the group's largest (Lloyd 1982).

    Fitted to rows spread evenly over the weight.
    """
    rows = max(1, FIT_SAMPLES // weight.shape[1])
    spread = weight[:: max(1, weight.shape[0] // rows)]
    groups = _rotate(spread, rotated).unflatten(1, (-1, GROUP))
    values = (groups / groups.abs().amax(dim=-1, keepdim=True).clamp(min=TINY)).flatten()
    values = values.sort().values
    sums = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    share = torch.linspace(0, 1, LEVELS, device=values.device)
    levels = values[(share * (len(values) - 1)).long()].double()
    for _ in range(FIT_STEPS):
        borders = ((levels[1:] + levels[:-1]) / 2).to(values.dtype)
        inner = torch.searchsorted(values, borders)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(values))])
        counts = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp(min=1)
        levels = torch.where(counts > 0, means, levels).sort().values
    return levels.float()


def unpack_w4(
    codes: Tensor, relative: Tensor, codebook: Float[Tensor, "*stack 16"] | None
) -> Int8[Tensor, "n k"]:
    """The int8 codes, of which s_channel is the scale: clamp(round(level[q] · s_rel), ±127).

    Codes of a stack of weights, one behind the other with as many rows each, have a codebook each.
    """
    packed = codes.view(torch.uint8)
    numbers = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()
    if codebook is None:
        levels = numbers - 8.0
    elif codebook.dim() == 1:
        levels = codebook[numbers]
    else:
        of_weights = numbers.long().view(codebook.shape[0], -1)
        levels = codebook.gather(1, of_weights).view(numbers.shape)
    values = levels.unflatten(1, (relative.shape[1], -1)) * relative.float()[..., None]
    return values.round_().clamp_(-LARGEST, LARGEST).flatten(1).to(torch.int8)


def dequantise_w4(
    codes: Tensor,
    relative: Tensor,
    channel: Float[Tensor, " n"],
    codebook: Float[Tensor, "*stack 16"] | None,
) -> Float[Tensor, "n k"]:
    """Ŵ in float32, rotated as it was quantised."""
    return unpack_w4(codes, relative, codebook).float() * row_scale(relative, channel)


def row_scale(relative: Tensor, channel: Float[Tensor, " n"]) -> Float[Tensor, "n 1"]:
    """s_channel of the int8 codes; NaN for rows whose s_rel holds one, which int8 cannot."""
    return channel[:, None].masked_fill(rows_with_nan(relative), torch.nan)


def _rotate(weight: Tensor, group: int) -> Tensor:
    return rotate_groups(weight, group) if group > 1 else weight.float()


def _quantise_rows(
    weight: Float[Tensor, "n k"], rotated: int, codebook: Float[Tensor, " 16"]
) -> tuple[Tensor, Tensor, Tensor]:
    groups = _rotate(weight, rotated).unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp(min=TINY)
    borders = (codebook[1:] + codebook[:-1]) / 2
    for _ in range(REFINEMENTS):
        # The best scale of a group for its levels, then the nearest levels for that scale.
        levels = codebook[torch.bucketize(groups / scale, borders)]
        norm = levels.square().sum(-1, keepdim=True)
        scale = ((groups * levels).sum(-1, keepdim=True) / norm.clamp(min=TINY)).clamp(min=TINY)
    levels = codebook[torch.bucketize(groups / scale, borders)]
    channel = ((levels * scale).abs().amax(dim=(1, 2)) / LARGEST).clamp(min=TINY)
    # As an e4m3 number every scale lies between its smallest and largest value.
    relative = (scale.squeeze(-1) / channel[:, None]).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    values = (relative.float()[..., None] * codebook).round().clamp(-LARGEST, LARGEST)
    values = values.flatten(0, 1)
    wanted = (groups / channel[:, None, None]).flatten(0, 1)
    numbers = torch.searchsorted((values[:, 1:] + values[:, :-1]) / 2, wanted)
    even, odd = numbers.view(weight.shape).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return (even | (odd << 4)).view(torch.int8), relative, channel
