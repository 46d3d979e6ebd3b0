"""Cutting images into square tokens or patches and putting them together again.

Two layouts are in use. Tokens of the generation stream hold their pixels channel last;
patches, the form of stored understanding input, channel first. Either way the squares
follow each other row by row.
"""

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
    return _cut(images, size, channels).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def unpatchify(
    tokens: Float[Tensor, "batch tokens values"], h: int, w: int, size: int, channels: int = RGB
) -> Float[Tensor, "batch c height width"]:
    """Undo `patchify` for a grid of `h` rows and `w` columns of tokens.

    Raises:
        ValueError: the shape is not [batch, h·w, size²·channels].
    """
    _check_squares(tokens, h, w, size, channels)
    squares = tokens.reshape(-1, h, w, size, size, channels)
    return squares.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, h * size, w * size)


def to_patches(
    image: Float[Tensor, "batch c height width"], size: int, channels: int = RGB
) -> Float[Tensor, "batch patches values"]:
    """Cut images into patches of `size` x `size` pixels, inside in order (channel, row, column).

    Returns:
        [batch, h·w, channels·size²] where h = height / size, w = width / size.

    Raises:
        ValueError: not so many channels, or a side is no multiple of `size`.
    """
    return _cut(image, size, channels).permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def from_patches(
    patches: Float[Tensor, "batch patches values"], h: int, w: int, size: int, channels: int = RGB
) -> Float[Tensor, "batch c height width"]:
    """Undo `to_patches` for a grid of `h` rows and `w` columns of patches.

    Raises:
        ValueError: the shape is not [batch, h·w, channels·size²].
    """
    _check_squares(patches, h, w, size, channels)
    squares = patches.reshape(-1, h, w, channels, size, size)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, h * size, w * size)


def _cut(images: Tensor, size: int, channels: int) -> Tensor:
    """View images as [batch, h, row, w, column, channel]."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images must be [batch, {channels}, height, width], got {tuple(images.shape)}"
        )
    batch, _, height, width = images.shape
    if size < 1 or height % size or width % size:
        raise ValueError(f"sides {height} and {width} must be multiples of the size {size}")
    squares = images.reshape(batch, channels, height // size, size, width // size, size)
    return squares.permute(0, 2, 3, 4, 5, 1)


def _check_squares(squares: Tensor, h: int, w: int, size: int, channels: int) -> None:
    width = channels * size * size
    if squares.ndim != 3 or squares.shape[1:] != (h * w, width):
        raise ValueError(
            f"a grid of {h} x {w} squares of side {size} needs "
            f"[batch, {h * w}, {width}], got {tuple(squares.shape)}"
        )
