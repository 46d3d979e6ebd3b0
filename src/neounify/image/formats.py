"""Formats and colours of image files: PNG chunks, AVIF and HEIC, ICC profiles, modes as sRGB.

A photo in Display P3 or Adobe RGB whose numbers are taken for sRGB looks washed out, and CMYK
means little without its profile. The published code ignores profiles; `read_image` can too.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, features

from neounify.errors import ImageError

# --- PNG: only its pixels, orientation and profile ---

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_METADATA_BYTES = 2**20
"""Largest unpacked metadata chunk that is passed on; Pillow refuses files with larger ones."""

MAX_CHUNKS = 200_000
"""Chunks of a file that are looked at; the rest is left to the decoder."""

MAX_METADATA_CHUNKS = 32
"""Metadata chunks that are unpacked: each may hold a thousand times its size."""

_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
# Text that may hold the orientation.
_ORIENTATION_KEYS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")


def essential_png(
    data: bytes, max_profile_bytes: int, keys: Sequence[str] = ()
) -> tuple[bytes, bytes | None]:
    """A PNG's pixels and orientation as a separate file, and its ICC profile if it has one.

    Text chunks with one of `keys` are kept too, up to MAX_METADATA_BYTES each.
    A profile that is damaged or larger than `max_profile_bytes` counts as none. Where the chunks
    end unexpectedly, the rest is kept as it is: the decoder says what is wrong.
    """
    view, profile, start = memoryview(data), None, len(SIGNATURE)
    kept: list[bytes | memoryview] = [SIGNATURE]
    texts = (*_ORIENTATION_KEYS, *(key.encode("latin-1") for key in keys))
    metadata, dropped = 0, False
    for kind, content, stop in _chunks(view):
        before = len(kept)
        if kind in _PIXELS:
            kept.append(view[start:stop])
        elif metadata < MAX_METADATA_CHUNKS:
            if kind == b"iCCP":
                metadata += 1
                profile = profile or _profile(content, max_profile_bytes)
            elif _is_wanted(kind, content, texts):
                metadata += 1
                kept.append(view[start:stop])
        dropped = dropped or len(kept) == before
        start = stop
    if not dropped:
        return data, profile
    kept.append(view[start:])
    return b"".join(kept), profile


def _chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview, int]]:
    """(kind, content, first byte behind the chunk) of every whole chunk up to IEND."""
    start, kind = len(SIGNATURE), b""
    for _ in range(MAX_CHUNKS):
        if start + 12 > len(view) or kind == b"IEND":
            return
        length = int.from_bytes(view[start : start + 4], "big")
        kind, stop = bytes(view[start + 4 : start + 8]), start + 12 + length
        if stop > len(view):
            return
        yield kind, view[start + 8 : stop - 4], stop
        start = stop


def _is_wanted(kind: bytes, content: memoryview, texts: Sequence[bytes]) -> bool:
    """Whether a chunk is EXIF or one of `texts`, and small enough for any decoder."""
    if kind == b"eXIf":
        return len(content) <= MAX_METADATA_BYTES
    if kind not in _TEXT or len(content) > MAX_METADATA_BYTES:
        return False
    key, _, rest = bytes(content).partition(b"\0")
    if key not in texts:
        return False
    if kind == b"zTXt":
        return _unpacked(rest[1:], MAX_METADATA_BYTES) is not None
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
        return _unpacked(packed, MAX_METADATA_BYTES) is not None
    return True


def _profile(content: memoryview, max_bytes: int) -> bytes | None:
    # A name of at most 79 bytes, a zero, the method of compression (0), the packed profile.
    start = bytes(content[:81]).find(b"\0")
    if start < 0 or bytes(content[start + 1 : start + 2]) != b"\0":
        return None
    return _unpacked(content[start + 2 :], max_bytes)


def _unpacked(packed: bytes | memoryview, max_bytes: int) -> bytes | None:
    """The content of a zlib stream, None when it is damaged, cut off, or larger."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, max_bytes + 1)
    except zlib.error:
        return None
    return content if stream.eof and len(content) <= max_bytes else None


# --- AVIF and HEIC, where a decoder is installed ---

_AVIF = (b"avif", b"avis")
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_ANY = (b"mif1", b"msf1", b"mif2", b"miaf")
_MAX_BRANDS_BYTES = 256


def isobmff_format(data: bytes) -> Literal["AVIF", "HEIC"] | None:
    """Which of the two a file is by its brands, None for other files."""
    if data[4:8] != b"ftyp":
        return None
    length = min(int.from_bytes(data[:4], "big"), _MAX_BRANDS_BYTES, len(data))
    brands = [data[8:12], *(data[n : n + 4] for n in range(16, length, 4))]
    if any(brand in _AVIF for brand in brands):
        return "AVIF"
    return "HEIC" if any(brand in (*_HEIC, *_ANY) for brand in brands) else None


def check_avif(name: str) -> None:
    """ImageError, which says what to install, when this Pillow has no AVIF decoder."""
    if not features.check("avif"):
        raise ImageError(
            f"{name}: an AVIF file, which this Pillow cannot decode; install Pillow 11.3 or newer"
        )


def open_heif(data: bytes, name: str) -> Image.Image:
    """A HEIC file, opened; its pixels are decoded when it is loaded.

    Raises ImageError when it is damaged or the decoder, pillow-heif, is not installed.
    """
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageError(
            f"{name}: a HEIC file, which needs a decoder: pip install pillow-heif"
        ) from error
    try:
        return HeifImageFile(BytesIO(data))
    except Exception as error:
        raise ImageError(f"{name}: not a whole HEIC file ({error})") from error


# --- ICC colour profiles ---

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


# --- modes ---


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image of a decoded image of any mode.

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
    """RGB image of greys in [0, 65535]; PIL keeps 32-bit integers for the same range."""
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
