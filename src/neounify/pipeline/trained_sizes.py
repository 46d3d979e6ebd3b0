"""Trained image sizes of a model, and a warning about all others."""

from __future__ import annotations

import math
import warnings

from neounify.config import CheckpointDefaults, ModelConfig
from neounify.errors import SizeWarning
from neounify.image.sizes import TRAINING_BUCKETS

PUBLISHED_PIXELS = (512**2, 2048**2)
"""(least, greatest) area the published models were trained to generate, in pixels."""

MAX_NAMED = 6
"""How many sizes a message lists."""

Size = tuple[int, int]


def trained_sizes(sampling: CheckpointDefaults) -> tuple[tuple[Size, ...], tuple[int, int] | None]:
    """((width, height) pairs, (least, greatest) area) in pixels that a checkpoint was trained at.

    A checkpoint that records neither and has the published default size is a published one.
    ((), None) if nothing is known.
    """
    if sampling.trained_sizes or sampling.trained_pixels:
        return sampling.trained_sizes, sampling.trained_pixels
    if sampling.image_size == CheckpointDefaults().image_size:
        return TRAINING_BUCKETS, PUBLISHED_PIXELS
    return (), None


def size_advice(config: ModelConfig, width: int, height: int) -> str | None:
    """A sentence that names the trained sizes, if width x height (pixels) is not one of them.

    None for a trained size, and where the checkpoint does not record its sizes.
    """
    sizes, pixels = trained_sizes(config.sampling)
    fits = pixels is not None and pixels[0] <= width * height <= pixels[1]
    if fits or (width, height) in sizes or not (sizes or pixels):
        return None
    return (
        f"size {width}x{height}: the model was trained at {named_sizes(sizes, pixels)}; "
        "images of other sizes may come out broken"
    )


def warn_untrained(config: ModelConfig, width: int, height: int) -> None:
    """Issue a SizeWarning at the caller's caller, unless the size is a trained one."""
    if advice := size_advice(config, width, height):
        warnings.warn(advice, SizeWarning, stacklevel=3)


def named_sizes(sizes: tuple[Size, ...], pixels: tuple[int, int] | None) -> str:
    """Trained sizes in words, as "64x64 only" or "areas from 512x512 to 2048x2048 pixels"."""
    listed = ", ".join(f"{w}x{h}" for w, h in sizes[:MAX_NAMED])
    more = f" and {len(sizes) - MAX_NAMED} more" if len(sizes) > MAX_NAMED else ""
    named = f"{listed}{more}" if len(sizes) != 1 else f"{listed} only"
    if pixels is None:
        return named
    low, high = (f"{math.isqrt(area)}x{math.isqrt(area)}" for area in pixels)
    area = f"areas from {low} to {high} pixels"
    return f"{area}, as {listed}{more}" if sizes else area
