"""Tokens of the generation stream: square pieces of images, row by row, channel last."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

RGB = 3
"""Channels of the images that files hold."""


def patchify(
    images: Float[Tensor, "batch c height width"], size: int, channels: int = RGB
) -> Float[Tensor, "batch tokens values"]:
    """Cut images into tokens of `size` x `size` pixels, inside in order (row, column, channel).

    Returns:
        [batch, h·w, size²·channels] where h = height / size, w = width / size.

    Raises:
        ValueError: not so many channels, or a side is no multiple of `size`.
    """
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images must be [batch, {channels}, height, width], got {tuple(images.shape)}"
        )
    height, width = images.shape[2:]
    if size < 1 or height % size or width % size:
        raise ValueError(f"sides {height} and {width} must be multiples of the size {size}")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def unpatchify(
    tokens: Float[Tensor, "batch tokens values"], h: int, w: int, size: int, channels: int = RGB
) -> Float[Tensor, "batch c height width"]:
    """Undo `patchify` for a grid of `h` rows and `w` columns of tokens.

    Raises:
        ValueError: the shape is not [batch, h·w, size²·channels].
    """
    width = channels * size * size
    if tokens.ndim != 3 or tokens.shape[1:] != (h * w, width):
        raise ValueError(
            f"a grid of {h} x {w} tokens of side {size} needs "
            f"[batch, {h * w}, {width}], got {tuple(tokens.shape)}"
        )
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=size, q=size)
