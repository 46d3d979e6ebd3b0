"""Measures of one image: format, size, sharpness, entropy, brightness, border; its hashes.

The perceptual hash has the definition of PDQ (Facebook, "The TMK+PDQF Video-Hashing Algorithm and
the PDQ Image-Hashing Algorithm", 2019): a 64 × 64 luma image, its DCT coefficients of rows and
columns 1 to 16, each a bit that says whether it is above their median; its quality is the sum of
the steps between neighbours, 0 (flat) to 100. The luma image here is an area average, theirs two
box filters: `docs/curation.md` has how far the two differ.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.errors import ImageError
from neounify.image.io import describe_image, read_image

LONG_SIDE = 512
"""Pixels of the long side of the luma image that sharpness and others are measured on."""
HASH_SIDE, HASH_WAVES = 64, 16
QUALITY_STEP = 90.0
"""PDQ's divisor of the sum of steps."""
FLAT_RANGE = 10
"""Luma values that the pixels of a one-colour line may be apart: JPEG adds a few."""

Luma = NDArray[np.uint8]


@dataclass
class ImageRow:
    """Measures of one image. None: not measured, because the sample ended before."""

    role: str
    file_bytes: int
    sha256: str
    format: str | None = None
    mode: str | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    sharpness: float | None = None
    entropy: float | None = None
    luma: float | None = None
    border: float | None = None
    pixels_sha256: str | None = None
    hash: bytes | None = None
    hash_quality: int | None = None


def decode(content: bytes, row: ImageRow, max_pixels: int, max_bytes: int) -> Image.Image:
    """The upright RGB image of a file, decoded to its end; fills the row. Raises ImageError."""
    if len(content) > max_bytes:
        raise ImageError(f"{len(content):,} bytes, more than {max_bytes:,}")
    facts = describe_image(content)
    row.format, row.mode, row.frames = facts.format, facts.mode, facts.frames
    row.width, row.height = facts.size
    image = read_image(content, max_pixels=max_pixels)
    row.width, row.height = image.size
    return image


def luma_of(image: Image.Image) -> Luma:
    """Luma [height, width] with a long side of at most LONG_SIDE."""
    grey = image.convert("L")
    scale = max(grey.size) / LONG_SIDE
    if scale > 1:
        size = (max(1, round(grey.width / scale)), max(1, round(grey.height / scale)))
        grey = grey.resize(size, Image.Resampling.BOX)
    return np.asarray(grey)


def measure_quality(luma: Luma, row: ImageRow) -> None:
    """Fill in sharpness, entropy, mean luma and border."""
    row.sharpness = laplacian_variance(luma)
    counts = np.bincount(luma.ravel(), minlength=256)
    shares = counts[counts > 0] / luma.size
    row.entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    row.luma = float(counts @ np.arange(256) / luma.size)
    row.border = border_share(luma)


def laplacian_variance(luma: Luma) -> float:
    """Variance of the 4-neighbour Laplacian inside the image; 0 below 3 × 3 pixels."""
    if min(luma.shape) < 3:
        return 0.0
    values = luma.astype(np.int16)
    inner = values[1:-1, 1:-1]
    edges = values[1:-1, :-2] + values[1:-1, 2:]
    edges += values[:-2, 1:-1]
    edges += values[2:, 1:-1]
    edges -= 4 * inner
    # Exact sums of integers: the same value on every machine.
    flat = edges.ravel().astype(np.float64)
    mean = int(edges.sum(dtype=np.int64)) / edges.size
    return float(flat @ flat) / edges.size - mean * mean


def border_share(luma: Luma) -> float:
    """Share of the area that lies in a one-colour frame: whole rows, then whole columns."""
    top, bottom = _one_colour(luma.min(1), luma.max(1))
    inside = luma[top : len(luma) - bottom]
    if not len(inside):
        return 1.0
    left, right = _one_colour(inside.min(0), inside.max(0))
    width = max(0, luma.shape[1] - left - right)
    return 1 - len(inside) * width / luma.size


def _one_colour(low: Luma, high: Luma) -> tuple[int, int]:
    """Lines from the start, and from the end, that are all of one colour."""
    counts = []
    for lows, highs in ((low, high), (low[::-1], high[::-1])):
        least = np.minimum.accumulate(lows).astype(np.int16)
        greatest = np.maximum.accumulate(highs)
        fits = greatest - least <= FLAT_RANGE
        counts.append(len(fits) if fits.all() else int(np.argmin(fits)))
    return counts[0], min(counts[1], len(low) - counts[0])


def measure_hashes(image: Image.Image, row: ImageRow) -> None:
    """Fill in the SHA-256 of the pixels, the perceptual hash and its quality."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    row.pixels_sha256 = digest.hexdigest()
    row.hash, row.hash_quality = perceptual_hash(image)


def perceptual_hash(image: Image.Image) -> tuple[bytes, int]:
    """256 bits in the order in which PDQ writes them in hex, highest waves first, and quality."""
    grey = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, np.float64)
    waves = _dct() @ values @ _dct().T
    # Rounded, so that another matrix library gives the same bits.
    waves = np.round(waves, 6)
    bits = waves > np.median(waves)
    across, down = np.diff(values, axis=1), np.diff(values, axis=0)
    steps = sum(float(np.trunc(np.abs(part) * 100 / 255).sum()) for part in (across, down))
    return np.packbits(bits.ravel()[::-1]).tobytes(), min(100, int(steps / QUALITY_STEP))


@lru_cache(maxsize=1)
def _dct() -> NDArray[np.float64]:
    """Rows 1 to HASH_WAVES of the DCT-II of HASH_SIDE values."""
    waves = np.arange(1, HASH_WAVES + 1)[:, None]
    places = np.arange(HASH_SIDE)[None]
    rows = np.cos(math.pi / (2 * HASH_SIDE) * waves * (2 * places + 1))
    return np.asarray(math.sqrt(2 / HASH_SIDE) * rows, np.float64)
