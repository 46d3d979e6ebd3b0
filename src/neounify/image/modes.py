"""Pixel modes: every mode PIL can decode, as RGB."""

import numpy as np
from PIL import Image, ImageCms

from neounify.errors import ImageError


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded picture of any mode to a new RGB picture.

    Transparency, an alpha channel or a colour marked transparent, is laid on white. Greys of
    16 bits are scaled to 8. Float greys are taken as [0, 1] when they stay within it, else
    as [0, 255].

    Raises:
        ImageError: the mode has no meaning as a picture.
    """
    mode = image.mode
    if mode.startswith("I"):
        return _from_16_bit(image)
    if mode == "F":
        return _from_float(image)
    if mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        return _on_white(image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"pictures of mode {mode} cannot be shown as RGB") from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # PIL has no direct way
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale greys in [0, 65535]; PIL keeps 32-bit integers for the same range."""
    values = np.asarray(image)
    levels = (np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _from_float(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0)
    if values.min() >= 0 and values.max() <= 1:
        values = values * 255
    levels = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if converted is None:
        raise ImageError("a picture in LAB colours cannot be converted")
    return converted
