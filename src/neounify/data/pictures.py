"""Pictures of stored samples: found below their folder, read with bounds, never fatal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from neounify.data.sample import DataError, ImagePart, Part, Sample, Turn
from neounify.errors import ImageError
from neounify.image import read_image
from neounify.image.io import MAX_DECODED_PIXELS

MAX_SAMPLE_PIXELS = 2 * MAX_DECODED_PIXELS
"""Pixels of all images of one sample, which are in memory together: a gigabyte as RGB."""


def with_pictures(sample: Sample, root: Path, *, colour_profiles: bool = True) -> Sample:
    """The sample with its files read as RGB. Raises DataError that names the file."""

    def read(path: Path) -> Image.Image:
        return read_picture(_inside(path, root), path.name, colour_profiles=colour_profiles)

    return map_pictures(sample, read)


def map_pictures(sample: Sample, read: Callable[[Path], Image.Image]) -> Sample:
    """The sample with the pictures that are still paths exchanged for what `read` makes of them."""

    pixels = 0

    def mapped(part: Part) -> Part:
        nonlocal pixels
        if not isinstance(part, ImagePart) or not isinstance(part.image, Path):
            return part
        image = read(part.image)
        pixels += image.width * image.height
        if pixels > MAX_SAMPLE_PIXELS:
            raise DataError(
                f"the images of the sample have more than {MAX_SAMPLE_PIXELS:,} pixels together; "
                "make them smaller, or split the record"
            )
        return ImagePart(image, part.role)

    turns = (Turn(turn.role, tuple(mapped(part) for part in turn.parts)) for turn in sample.turns)
    return replace(sample, turns=tuple(turns))


def read_picture(source: Path | bytes, name: str, *, colour_profiles: bool = True) -> Image.Image:
    """Read a file or its bytes; DataError that names it once."""
    try:
        return read_image(source, colour_profiles=colour_profiles)
    except ImageError as error:
        # The reader names a file by its path, and bytes by no name.
        text = str(error)
        known = isinstance(source, Path) and str(source) in text
        raise DataError(text if known else f"{name}: {text.removeprefix('the image: ')}") from error


def _inside(path: Path, root: Path) -> Path:
    """The path, once links are followed, if it lies below the root."""
    try:
        base, resolved = root.resolve(), path.resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # links in a circle; names no file can have
        raise DataError(f"the image {path.name[:80]!r} cannot be found: {error}"[:300]) from error
    if not resolved.is_relative_to(base):
        raise DataError(
            f"the image {path.name} lies outside the data folder {root}; name the folder of the "
            "images in the recipe (images = FOLDER beside path)"
        )
    if "\\" in path.name and not resolved.exists():
        raise DataError(f"there is no image {path.name}; paths are written with /")
    return resolved
