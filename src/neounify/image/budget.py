"""Decoding budget of untrusted images: memory, time, and reads of a parser."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

from PIL import Image

from neounify.errors import ImageError
from neounify.image.sizes import check_aspect

MAX_READS = 200_000
"""Reads of one file by Pillow's parsers, which walk it in Python: some 0.3 s of work."""

_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2, "F": 16}
_OTHER_MODE_BYTES = 4
"""Bytes of a decoded pixel by Pillow's mode; floats are converted by way of three copies."""

_DECODER_BYTES = {"WEBP": 16, "AVIF": 10, "HEIF": 8}
"""Bytes that a decoder takes for each pixel, beside which the mode's do not count; measured."""

_DCT_BYTES, _DCT_SAMPLES = 2, 3
"""A progressive JPEG keeps all coefficients of all components until its last scan."""

_SCAN_SHARE = 0.04
"""Time of one scan of a progressive JPEG as a share of decoding the pixels once; measured."""

_SLOW_FORMATS = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    **{b"P%d" % number: "PPM" for number in range(1, 8)},
}
_READ = "PNG, JPEG, WebP, GIF, BMP, AVIF or HEIC"


class MeteredFile(BytesIO):
    """A file in memory that fails after MAX_READS reads: nothing sane is cut into more pieces."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ImageError."""
        self._reads += 1
        if self._reads > MAX_READS:
            raise ImageError(f"cut into more than {MAX_READS} pieces")
        return super().read(size)


class DecodeBudget:
    """Budget of all images of one request; not for several threads at a time.

    `max_pixels` bounds the time: pixels of all images, by their formats' speed. `max_bytes` bounds
    the memory of each while it is decoded, its file included. Images are reduced by whole factors
    while they are decoded, to no fewer than `keep_pixels`.
    """

    def __init__(self, *, max_pixels: int, max_bytes: int, keep_pixels: int) -> None:
        self._max_pixels, self._max_bytes = max_pixels, max_bytes
        self._keep_pixels = keep_pixels
        self._left = float(max_pixels)
        self.last_bytes = 0
        """What the last image took while it was decoded, in bytes."""

    def check_format(self, data: bytes, name: str) -> None:
        """ImageError for formats that pack into a small file what takes long to read."""
        for magic, kind in _SLOW_FORMATS.items():
            if data.startswith(magic):
                raise ImageError(f"{name}: {kind} files are not read here; send {_READ}")

    def admit(self, image: Image.Image, file: bytes, name: str) -> None:
        """Count an image that was opened and not yet decoded. Raises ImageError over the limits."""
        check_aspect(image.height, image.width)
        # Twice: there is a copy as a data URL or without metadata.
        needed = 2 * len(file) + _decoding_bytes(image, self.factor(image))
        if needed > self._max_bytes:
            raise ImageError(
                f"{name}: decoding a {image.format} of {image.width}x{image.height} takes "
                f"{needed // 2**20} MiB; at most {self._max_bytes // 2**20} are allowed. Send it "
                "smaller, or as a baseline JPEG"
            )
        self.last_bytes = needed
        self._left -= _cost(image, file)
        if self._left < 0:
            raise ImageError(
                f"{name}: the images of a request may have {self._max_pixels} pixels together "
                "(a quarter of that counts for JPEG); send fewer or smaller ones"
            )

    def factor(self, image: Image.Image) -> int:
        """By what an image's sides are divided."""
        return max(1, math.isqrt(image.width * image.height // self._keep_pixels))


def _decoding_bytes(image: Image.Image, factor: int) -> int:
    pixels = image.width * image.height
    pixel_bytes = _MODE_BYTES.get(image.mode, _OTHER_MODE_BYTES)
    if image.format in _DECODER_BYTES:
        return pixels * _DECODER_BYTES[image.format]
    if image.format not in ("JPEG", "MPO"):
        return pixels * pixel_bytes
    decoded = pixels * pixel_bytes // min(8, 1 << (factor.bit_length() - 1)) ** 2
    return decoded + (_coefficients(image) * _DCT_BYTES if _is_progressive(image) else 0)


def _cost(image: Image.Image, file: bytes) -> float:
    """Pixels that take as long as decoding this image."""
    pixels = image.width * image.height
    if image.format not in ("JPEG", "MPO"):
        return pixels
    if not _is_progressive(image):
        return pixels / 4
    return pixels * (0.5 + _SCAN_SHARE * file.count(b"\xff\xda"))


def _is_progressive(image: Image.Image) -> bool:
    return bool(image.info.get("progressive"))


def _coefficients(image: Image.Image) -> int:
    """Samples of all components, with those that hold fewer than a pixel each."""
    layers: Any = getattr(image, "layer", None)
    pixels = image.width * image.height
    try:
        sizes = [across * down for _, across, down, *_ in layers]
        return math.ceil(pixels * sum(sizes) / max(sizes))
    except (TypeError, ValueError, ZeroDivisionError):
        return pixels * _DCT_SAMPLES
