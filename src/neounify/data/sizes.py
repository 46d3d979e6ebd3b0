"""Sizes of images and frames in training: buckets, crops and resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
"""An image [height, width, 3], with frames in front where it is a tube or a clip."""


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) whose shape is nearest by the ratio of ratios; of equals, by area."""
    if not buckets:
        raise ValueError("there are no buckets to choose from")

    def distance(bucket: tuple[int, int]) -> tuple[float, float]:
        shape = abs(math.log(bucket[0] / bucket[1] * height / width))
        area = abs(math.log(bucket[0] * bucket[1] / (width * height)))
        return round(shape, 9), area

    return min(buckets, key=distance)


def crop_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image to cover `size` = (width, height), bicubic, and crop the centre."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    # The visible part of the original, in its pixels.
    box_width, box_height = width / scale, height / scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize(size, Image.Resampling.BICUBIC, box=box)


def resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """An image of `size` = (height, width), bicubic."""
    if size == pixels.shape[:2]:
        return pixels
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
