"""Images: reading, sizes, pixel values, tokens, contact sheets."""

from neounify.deprecation import moved
from neounify.image.formats import to_rgb
from neounify.image.io import MAX_DECODED_PIXELS, MAX_FILE_BYTES, ImageSource, read_image
from neounify.image.pixels import (
    MAX_ASPECT_RATIO,
    MEAN,
    STD,
    TRAINING_BUCKETS,
    check_size,
    fit_size,
    nearest_legal_sizes,
    normalise_und,
    patchify,
    prepare_image,
    to_pil,
    to_und_pixels,
    unpatchify,
)

__all__ = [
    "MAX_ASPECT_RATIO",
    "MAX_DECODED_PIXELS",
    "MAX_FILE_BYTES",
    "MEAN",
    "STD",
    "TRAINING_BUCKETS",
    "ImageSource",
    "check_size",
    "fit_size",
    "nearest_legal_sizes",
    "normalise_und",
    "patchify",
    "prepare_image",
    "read_image",
    "to_pil",
    "to_rgb",
    "to_und_pixels",
    "unpatchify",
]

__getattr__ = moved(__name__, "neounify.image.io", {"Source": "ImageSource"})
