"""Pixels of clips: tubes, each several frames of which one place is one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad


def tube_rows(
    frames: Float[Tensor, "frames c height width"], size: int, tube_frames: int
) -> Float[Tensor, "tokens values"]:
    """Tokens of `size` x `size` pixels in `tube_frames` frames, in order (tube, row, column).

    Each is in order (frame, row, column, channel), tube_frames · size² · c values. Raises
    ValueError for frames or sides that do not divide.
    """
    count, _, height, width = frames.shape
    if count % tube_frames or height % size or width % size:
        raise ValueError(
            f"{count} frames of {width}x{height} pixels: frames must be a multiple of "
            f"{tube_frames}, sides of {size}"
        )
    cut = "(g f) c (h p) (w q) -> (g h w) (f p q c)"
    return rearrange(frames, cut, f=tube_frames, p=size, q=size)


def rows_to_frames(
    tokens: Float[Tensor, "tokens values"],
    rows: int,
    columns: int,
    size: int,
    tube_frames: int,
) -> Float[Tensor, "frames c height width"]:
    """Frames of tubes of `rows` x `columns` tokens: the inverse of `tube_rows`.

    Raises ValueError for a number of tokens that is no multiple of rows · columns.
    """
    if tokens.shape[0] % (rows * columns) or tokens.shape[1] % (tube_frames * size**2):
        raise ValueError(
            f"tokens {tuple(tokens.shape)} are no tubes of {rows} x {columns} tokens of "
            f"{tube_frames} frames and {size}x{size} pixels"
        )
    join = "(g h w) (f p q c) -> (g f) c (h p) (w q)"
    return rearrange(tokens, join, h=rows, w=columns, f=tube_frames, p=size, q=size)


def join_rows(
    rows: Sequence[Float[Tensor, "_n _values"]], width: int = 0
) -> Float[Tensor, "n values"]:
    """Rows of tokens one after the other, padded with zeros to the longest, or to `width`."""
    width = max(width, *(x.shape[1] for x in rows))
    if len(rows) == 1 and rows[0].shape[1] == width:
        return rows[0]
    return torch.cat([pad(x, (0, width - x.shape[1])) if x.shape[1] < width else x for x in rows])


@torch.inference_mode(False)
def cut_levels(pixels: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels in [-1, 1] moved down to one of 256 levels, as the published code of PixelUMM does."""
    levels = ((pixels.float().clamp(-1, 1) + 1) / 2 * 255).floor()
    return levels / 255 * 2 - 1


@torch.inference_mode(False)
def frame_levels(
    frames: Float[Tensor, "frames c height width"],
) -> UInt8[Tensor, "frames height width c"]:
    """Frames of the generation stream, in [-1, 1], clamped and rounded to 256 levels."""
    levels = (((frames.float() + 1) / 2).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()
