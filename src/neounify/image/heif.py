"""AVIF and HEIC: images in an ISO media container, read where their decoder is installed."""

from __future__ import annotations

from io import BytesIO
from typing import Literal

from PIL import Image, features

from neounify.errors import ImageError

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
    """Open a HEIC file; its pixels are decoded when it is loaded.

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
