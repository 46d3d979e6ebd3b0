"""The 32 bits of the invisible mark: a magic number, a number to choose, and a check of it.

Words of different numbers differ in at least 5 bits, so up to 2 wrong bits are put right without
taking one number for another. A random word is within 2 bits of some mark with a probability of
256 · 529 / 2³² = 3e-5.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint8]

BITS = 32
MAX_NUMBER = 255
MAX_WRONG_BITS = 2

_MAGIC = 0x6EB5
_POLYNOMIAL = 0x39  # x⁸ + x⁵ + x⁴ + x³ + 1; the common x⁸ + x² + x + 1 has distance 4 only


def write_bits(number: int) -> Bits:
    """The word of a number from 0 to MAX_NUMBER, most significant bit first."""
    return _words()[number]


def read_bits(bits: Bits) -> int | None:
    """The number of the word nearest to these bits; None if no word is near."""
    wrong = np.count_nonzero(_words() != bits, axis=1)
    nearest = int(wrong.argmin())
    return nearest if wrong[nearest] <= MAX_WRONG_BITS else None


@lru_cache(maxsize=1)
def _words() -> Bits:
    words = [_word(number) for number in range(MAX_NUMBER + 1)]
    return np.unpackbits(np.array(words, dtype=">u4").view(np.uint8)).reshape(-1, BITS)


def _word(number: int) -> int:
    return _MAGIC << 16 | number << 8 | _check(number)


def _check(number: int) -> int:
    """CRC-8 of one byte."""
    rest = number
    for _ in range(8):
        rest = (rest << 1 ^ _POLYNOMIAL) & 0xFF if rest & 0x80 else rest << 1
    return rest
