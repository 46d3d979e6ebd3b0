"""Pixels: between RGB images, the value ranges of the streams, and tokens (square pieces)."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from neounify.image.sizes import fit_size

MEAN = (0.485, 0.456, 0.406)
"""Mean of the understanding stream's input, per channel of pixels in [0, 1]."""

STD = (0.229, 0.224, 0.225)
"""Standard deviation of the understanding stream's input, per channel."""


def to_und_pixels(
    image: Image.Image, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "3 height width"]:
    """Turn an RGB image into input of the understanding stream: (x - MEAN) / STD.

    Computed in float32, then cast to `dtype`.

    Raises:
        ValueError: the image is not RGB.
    """
    return normalise_und(_to_unit(image)).to(dtype)


def normalise_und(
    x: Float[Tensor, "*batch 3 height width"],
) -> Float[Tensor, "*batch 3 height width"]:
    """Normalise pixels in [0, 1] for the understanding stream, in their own dtype.

    Values outside [0, 1] are not clamped.

    Raises:
        ValueError: the third dimension from the end is not 3 channels.
    """
    if x.ndim < 3 or x.shape[-3] != len(MEAN):
        raise ValueError(f"pixels must be [..., 3, height, width], got {tuple(x.shape)}")
    mean = torch.tensor(MEAN, dtype=x.dtype, device=x.device)[:, None, None]
    std = torch.tensor(STD, dtype=x.dtype, device=x.device)[:, None, None]
    return (x - mean) / std


def to_pil(pixels: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Turn pixels of the generation stream, in [-1, 1], into RGB images.

    Values outside are clamped; each is rounded to the nearest of 256 levels.

    Raises:
        ValueError: the shape is not [batch, 3, height, width].
    """
    if pixels.ndim != 4 or pixels.shape[1] != len(MEAN):
        raise ValueError(f"pixels must be [batch, 3, height, width], got {tuple(pixels.shape)}")
    unit = (pixels.detach().float() + 1) / 2
    levels = (unit.clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def prepare_image(
    image: Image.Image,
    *,
    multiple: int,
    min_pixels: int,
    max_pixels: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "3 height width"]:
    """Resize an RGB prompt image by the rule of `fit_size` (bicubic) and normalise it.

    Args:
        image: of any size.
        multiple: what both sides of the result are multiples of, in pixels.
        min_pixels: least area of the result, in pixels.
        max_pixels: greatest area of the result, in pixels.
        dtype: of the result.

    Raises:
        ImageError: the image is too narrow or the bounds make no sense.
        ValueError: the image is not RGB.
    """
    height, width = fit_size(
        image.height, image.width, multiple=multiple, min_pixels=min_pixels, max_pixels=max_pixels
    )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_und_pixels(image, dtype)


def _to_unit(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Return the pixels in [0, 1] as float32."""
    if image.mode != "RGB":
        raise ValueError(f"the image must be RGB, not {image.mode}; read_image converts it")
    levels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return levels.permute(2, 0, 1).contiguous().float() / 255


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
