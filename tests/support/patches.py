"""The recorded layout of understanding input: patches, inside in order (channel, row, column)."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def to_patches(images: Tensor, size: int) -> Tensor:
    """[batch, channels, height, width] to [batch, patches, channels · size²], row by row."""
    batch, channels, height, width = images.shape
    squares = images.reshape(batch, channels, height // size, size, width // size, size)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(patches: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """Undo `to_patches` for a grid of patches."""
    squares = patches.reshape(len(patches), rows, columns, -1, size, size)
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def to_gen_pixels(image: Image.Image) -> Tensor:
    """An RGB image in the range of the generation stream: [3, height, width], 2x - 1."""
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.reshape(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1
