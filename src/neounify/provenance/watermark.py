"""An invisible mark in the pixels, by the library invisible-watermark.

The mark is stored in the brightness of 16×16 fields, whatever the size of the image, so it
survives resizing. Each field holds one bit: the library moves its brightness (the largest singular
value of its cosine transform) to a quarter or three quarters of a step.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.errors import ImageError, NeounifyError, missing_extra

MIN_SIDE = 64
"""The smallest image that is marked, in pixels a side."""

STEP = 255 / 36.75
"""Levels of brightness from one 0 to the next. White is then a 1 exactly: it cannot get whiter."""

_GRID = 128  # side of the reduced image
_FIELD = 8  # side of a field in it
# A level of brightness is 2 in the library's coefficients, times the side in the cosine transform.
_OPTIONS: dict[str, Any] = {
    "method": "dwtDctSvd",
    "block": _FIELD,
    "scales": [STEP * 2 * _FIELD, 0, 0],
}
# A channel at its end cannot follow: every pass corrects what clipping took of the one before.
_PASSES = 6

Floats = NDArray[np.float32]


class MarkError(NeounifyError, RuntimeError):
    """The library of the mark is not installed, or the mark could not be written into an image."""


class Marker:
    """Marks images with a number from 0 to 255, and reads the mark of any of them.

    Raises MarkError if the library is missing, ValueError for other numbers.
    """

    def __init__(self, number: int = 1) -> None:
        if not 0 <= number <= MAX_NUMBER:
            raise ValueError(f"the number of the mark must be from 0 to {MAX_NUMBER}, not {number}")
        try:
            import imwatermark
        except ImportError as error:
            raise MarkError(missing_extra("invisible marks", "watermark", error)) from error
        self._library = imwatermark
        self._bits = [int(bit) for bit in write_fields(number)]
        self._number, self._name = number, f"neounify:{number}"

    def mark(self, image: Image.Image) -> Image.Image:
        """A copy of the image, RGB, that carries the mark.

        Raises ImageError below MIN_SIDE, MarkError if the mark cannot be read back.
        """
        if min(image.size) < MIN_SIDE:
            raise ImageError(
                f"{image.width}x{image.height} is too small for an invisible mark; "
                f"it needs {MIN_SIDE} pixels a side"
            )
        marked = image.convert("RGB")
        for _ in range(_PASSES):
            marked = self._embed(marked)
        if self.read(marked) != self._name:
            fields = int(agreeing(self.fields(marked))[self._number])
            raise MarkError(
                f"the image did not take the invisible mark: {fields} of {FIELDS} fields hold it "
                f"after {_PASSES} passes, {MIN_AGREEING} are needed"
            )
        return marked

    def read(self, image: Image.Image) -> str | None:
        """The mark of an image, "neounify:NUMBER"; None if there is none."""
        number = read_fields(self.fields(image))
        return None if number is None else f"neounify:{number}"

    def fields(self, image: Image.Image) -> Bits:
        """The bits of all fields, whether there is a mark or not."""
        decoder = self._library.WatermarkDecoder("bits", FIELDS)
        bits = decoder.decode(_doubled(_reduced(image.convert("RGB"))), **_OPTIONS)
        return np.asarray(bits, dtype=np.uint8)

    def _embed(self, image: Image.Image) -> Image.Image:
        encoder = self._library.WatermarkEncoder()
        encoder.set_watermark("bits", self._bits)
        before = _reduced(image)
        after = encoder.encode(_doubled(before), **_OPTIONS)[::2, ::2]
        change = _resized(after - before, image.size)[..., ::-1]
        pixels = np.rint(np.asarray(image, dtype=np.float32) + change)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _reduced(image: Image.Image) -> Floats:
    """The image at _GRID pixels a side, in the library's order of blue, green, red."""
    return _resized(np.asarray(image, dtype=np.float32), (_GRID, _GRID))[..., ::-1]


def _doubled(image: Floats) -> Floats:
    """Every pixel as four, in separate memory.

    The library refuses less than 256 pixels a side, and swaps the horizontal and vertical details
    of what it marks: made of fours, an image has none. Floats, as it lets bytes overflow.
    """
    return np.ascontiguousarray(image.repeat(2, axis=0).repeat(2, axis=1))


def _resized(image: Floats, size: tuple[int, int]) -> Floats:
    planes = [
        Image.fromarray(np.ascontiguousarray(image[..., channel])).resize(
            size, Image.Resampling.BICUBIC
        )
        for channel in range(image.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


Bits = NDArray[np.uint8]

FIELDS = 256
MAX_NUMBER = 255
MIN_AGREEING = 176

_WORD_BITS = 32
_MAGIC = 0x6EB5
_POLYNOMIAL = 0x39  # x⁸ + x⁵ + x⁴ + x³ + 1; the common x⁸ + x² + x + 1 has distance 4 only
_PATTERN = sha256(b"neounify mark").digest()


def write_fields(number: int) -> Bits:
    """The bits of all fields, row by row, for a number from 0 to MAX_NUMBER."""
    return _marks()[number]


def agreeing(fields: Bits) -> NDArray[np.int64]:
    """Number of fields that agree with the mark of each number."""
    return np.count_nonzero(_marks() == fields, axis=1)


def read_fields(fields: Bits) -> int | None:
    """The number whose mark most fields agree with; None if too few do."""
    agree = agreeing(fields)
    number = int(agree.argmax())
    return number if agree[number] >= MIN_AGREEING else None


@lru_cache(maxsize=1)
def _marks() -> Bits:
    words = np.array([_word(number) for number in range(MAX_NUMBER + 1)], dtype=">u4")
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, _WORD_BITS)
    flips = np.unpackbits(np.frombuffer(_PATTERN, dtype=np.uint8))
    return np.tile(bits, FIELDS // _WORD_BITS) ^ flips


def _word(number: int) -> int:
    return _MAGIC << 16 | number << 8 | _check(number)


def _check(number: int) -> int:
    """CRC-8 of one byte."""
    rest = number
    for _ in range(8):
        rest = (rest << 1 ^ _POLYNOMIAL) & 0xFF if rest & 0x80 else rest << 1
    return rest
