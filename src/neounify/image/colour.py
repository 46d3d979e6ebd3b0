"""Embedded ICC colour profiles: pixels of any colour space, as sRGB.

A photo in Display P3 or Adobe RGB whose numbers are taken for sRGB looks washed out, and CMYK
means little without its profile. The published code ignores profiles; `read_image` can too.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from neounify.errors import ImageError

MAX_PROFILE_BYTES = 4 * 2**20
"""Largest profile that is used, in bytes; those of printers have up to about 3 MB."""

MAX_TAGS = 100
"""Of a profile; the library refuses more."""

SRGB_TOLERANCE = 2
"""A profile that moves no colour by more levels (of 256) is sRGB, and nothing is computed."""

_LATTICE = 9
_MODES = {"RGB ": ("RGB", "RGBA"), "GRAY": ("L",), "CMYK": ("CMYK",)}
"""A profile's colour space → Pillow's modes that are converted."""
_SHOWN_AS_RGB = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "1", "L", "LA", "YCbCr")


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image with its colours converted from `profile` to sRGB; alpha is kept.

    Relative colorimetric with black point compensation. The image is returned as it is when
    the profile is missing, damaged, above MAX_PROFILE_BYTES, for pixels of another kind, or sRGB.
    Greys of 16 bits become 8 bits first; floats and LAB are returned as they are.
    """
    if not profile or len(profile) > MAX_PROFILE_BYTES or not _is_bounded(profile):
        return image
    try:
        space = _open(profile).profile.xcolor_space
        return _converted(image, profile, space)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image  # the profile is damaged; the pixels are not


def _is_bounded(profile: bytes) -> bool:
    """Whether no tag is a chain of processing elements: no photo has one, and it may take hours."""
    for tag in range(min(MAX_TAGS, int.from_bytes(profile[128:132], "big"))):
        start = int.from_bytes(profile[136 + 12 * tag : 140 + 12 * tag], "big")
        if profile[start : start + 4] == b"mpet":
            return False
    return True


def _open(profile: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(BytesIO(profile))


def _converted(image: Image.Image, profile: bytes, space: str) -> Image.Image:
    plain = _plain(image, space)
    if plain.mode == "LA":
        grey, alpha = plain.split()
        converted = _transformed(grey, profile, "RGB")
        converted.putalpha(alpha)
        return converted
    if plain.mode not in _MODES.get(space, ()):
        return image
    return _transformed(plain, profile, plain.mode if space == "RGB " else "RGB")


def _plain(image: Image.Image, space: str) -> Image.Image:
    """The image in a mode with pixels of `space`; as it is where it has none."""
    if image.mode.startswith("I") and space in ("RGB ", "GRAY"):
        image = to_rgb(image).getchannel("R")
    if image.mode == "La":  # Pillow has no direct way to other modes
        image = image.convert("LA")
    transparent = image.has_transparency_data
    if space == "RGB " and image.mode in _SHOWN_AS_RGB:
        return image.convert("RGBA" if transparent else "RGB")
    if space == "GRAY" and image.mode in ("1", "L", "LA"):
        return image.convert("LA" if transparent else "L")
    return image


def _transformed(image: Image.Image, profile: bytes, target: str) -> Image.Image:
    transform = _transform(profile, image.mode, target)
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=4)
def _transform(profile: bytes, mode: str, target: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion to sRGB, None where it changes nothing.

    Kept, because one from a table takes up to 50 ms to build and large images are read in strips.
    """
    transform = ImageCms.buildTransform(
        _open(profile),
        ImageCms.createProfile("sRGB"),
        mode,
        target,
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return None if mode == target and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, _LATTICE).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(lattice).convert(mode)
    after = ImageCms.applyTransform(before, transform)
    if after is None:
        return True
    moved = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int))
    return int(moved.max()) <= SRGB_TOLERANCE


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to a new RGB image.

    Transparency, an alpha channel or a colour marked transparent, is laid on white. Greys of
    16 bits are scaled to 8. Float greys are taken as [0, 1] when they stay within it, else
    as [0, 255].

    Raises:
        ImageError: the mode has no meaning as an image.
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
        raise ImageError(f"images of mode {mode} cannot be shown as RGB") from error


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
        raise ImageError("an image in LAB colours cannot be converted")
    return converted
