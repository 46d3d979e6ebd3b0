"""Hadamard rotation of groups of channels, which spreads outliers before weights are rounded.

H is a Kronecker power of ½·[[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]: symmetric
and orthogonal, so it is its own inverse. It acts on each group of G channels (regular Hadamard
rotation, as in ConvRot, arXiv 2512.03673).
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

MAX_GROUP = 256
FACTOR = 16
"""Channels that are rotated in one product; H of larger groups is a product of two."""


def group_size(channels: int) -> int:
    """G: the largest power of 4 that divides `channels`, at most 256."""
    size = 1
    while size < MAX_GROUP and channels % (4 * size) == 0:
        size *= 4
    return size


def is_group(size: int, channels: int) -> bool:
    """Whether groups of `size` channels can be rotated: a power of 4 to 256 that divides them."""
    return size in (4, 16, 64, 256) and channels % size == 0


@cache
def hadamard(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    """H of `size` = 4^n channels, float32."""
    # The cached matrix must serve training too, whatever mode the first caller is in.
    with torch.inference_mode(False):
        # Made on the device: an upload of indices would have the host wait for it.
        four = 0.5 - torch.eye(4, device=device).flip(1)
        matrix = torch.ones(1, 1, device=device)
        while matrix.shape[0] < size:
            matrix = torch.kron(matrix, four)
        return matrix


def rotate_groups(rows: Float[Tensor, "n k"], size: int) -> Float[Tensor, "n k"]:
    """rows · H on each group of `size` channels, in float32; twice gives the rows again.

    Large groups are taken as matrices, H_ab x = H_a X H_b, which is a tenth of the work.
    """
    inner = min(size, FACTOR)
    right = rows.float().reshape(-1, inner) @ hadamard(inner, rows.device)
    if size > inner:
        outer = hadamard(size // inner, rows.device)
        right = outer @ right.view(-1, size // inner, inner)
    return right.view(rows.shape)
