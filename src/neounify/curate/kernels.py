"""Loops over hashes, compiled by Numba on their first call."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

from neounify.curate.near import BAND_BITS, BANDS_PER_WORD


def _set_bits(context: Any, value: Any) -> Any:
    """Number of bits that are set, by the processor's instruction."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return numba.types.uint64(numba.types.uint64), code


ones: Any = intrinsic(_set_bits)


@numba.njit(nogil=True)
def distance_of(one: Any, other: Any) -> int:
    """Bits in which two hashes differ."""
    total = ones(one[0] ^ other[0]) + ones(one[1] ^ other[1])
    return int(total + ones(one[2] ^ other[2]) + ones(one[3] ^ other[3]))


@numba.njit(nogil=True)
def is_earlier(one: Any, other: Any, band: int, probe: int) -> bool:
    """Whether an earlier band makes candidates of two hashes."""
    for number in range(band):
        difference = one[number // BANDS_PER_WORD] ^ other[number // BANDS_PER_WORD]
        piece = (difference >> np.uint64(number % BANDS_PER_WORD * BAND_BITS)) & np.uint64(0xFFFF)
        if ones(piece) <= probe:
            return True
    return False


@numba.njit(nogil=True)
def band_loop(
    words: Any,
    order: Any,
    starts: Any,
    first: Any,
    second: Any,
    band: int,
    distance: int,
    probe: int,
    pairs: Any,
) -> int:
    """Write the pairs of a band into `pairs` as far as there is room; returns how many there are.

    words: [n, 4]; order: hashes sorted by the band, [n]; starts: the first place of each value of
    the band, [2^16 + 1]; first, second: two words without the band in that order, [n].
    """
    count = 0
    for key in range(1 << BAND_BITS):
        for bit in range(-1, BAND_BITS if probe else 0):
            other = key if bit < 0 else key ^ (1 << bit)
            if other < key:
                continue
            end = starts[other + 1]
            for at in range(starts[key], starts[key + 1]):
                begin = at + 1 if other == key else starts[other]
                one, two = first[at], second[at]
                close = 0
                for to in range(begin, end):  # without a branch, so that it is vectorised
                    close += (ones(one ^ first[to]) + ones(two ^ second[to])) <= distance
                if close == 0:
                    continue
                for to in range(begin, end):
                    a, b = order[at], order[to]
                    bits = distance_of(words[a], words[b])
                    if bits > distance or is_earlier(words[a], words[b], band, probe):
                        continue
                    if count < pairs.shape[0]:
                        pairs[count, 0] = min(a, b)
                        pairs[count, 1] = max(a, b)
                        pairs[count, 2] = bits
                    count += 1
    return count


@numba.njit(nogil=True)
def list_loop(words: Any, listed: Any, distance: int) -> Any:
    """The first of `listed` within a distance of each of `words`, -1 where there is none, [n]."""
    result = np.full(words.shape[0], -1, np.int64)
    for number in range(words.shape[0]):
        for other in range(listed.shape[0]):
            if distance_of(words[number], listed[other]) <= distance:
                result[number] = other
                break
    return result
