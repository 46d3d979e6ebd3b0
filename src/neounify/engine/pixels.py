"""Pixels of images and clips that were denoised, from their tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import ModelConfig
from neounify.image.clips import rows_to_frames
from neounify.image.pixels import unpatchify
from neounify.model.layout import Grid


@torch.inference_mode(False)
def to_pixels(
    tokens: Float[Tensor, "n ccc"], grid: Grid, config: ModelConfig
) -> Float[Tensor, "c h w"]:
    """The image [channels, height, width] of tokens, float32 on the CPU."""
    images = tokens.unsqueeze(0)
    return unpatchify(images, grid.rows, grid.columns, config.token_size, config.channels)[0].cpu()


@torch.inference_mode(False)
def tube_frames(
    tokens: Float[Tensor, "n fccc"], grid: Grid, number: int, config: ModelConfig
) -> Float[Tensor, "frames c h w"]:
    """The frames of one tube of a clip, float32 on the CPU."""
    assert config.video is not None
    count = grid.rows * grid.columns
    tube = tokens[number * count : (number + 1) * count]
    size, frames = config.token_size, config.video.tube_frames
    return rows_to_frames(tube, grid.rows, grid.columns, size, frames).float().cpu()
