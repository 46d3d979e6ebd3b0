"""Resolution buckets: a few sizes for pictures of any shape, so that batches are regular."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image


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
    """Scale a picture to cover `size` = (width, height), bicubic, and cut the middle out."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    # The part of the original that will be seen, as a box of real numbers.
    box_width, box_height = width / scale, height / scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize(size, Image.Resampling.BICUBIC, box=box)
