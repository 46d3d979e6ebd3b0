"""Images and clips that the samples of files name: places of their files, and reading.

Paths lie below a folder, links followed; contents may stand in a record itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from neounify.data.reasons import reason_of
from neounify.data.sample import ClipFile, DataError, Part, Sample, SampleImage
from neounify.errors import ImageError
from neounify.image import read_image
from neounify.image.io import MAX_DECODED_PIXELS

Blobs = dict[str, bytes]
"""Images and clips that stand in a record itself, by the names that replace them."""
IN_RECORD = "the file in the record"
"""Name of such an image or clip in messages."""
MAX_SAMPLE_PIXELS = 2 * MAX_DECODED_PIXELS
"""Pixels of all images, or of all frames, of one sample in memory together: a gigabyte as RGB."""


@dataclass(frozen=True)
class Unread:
    """A sample whose images and clips are names yet; `find` gives the file or content of one.

    `find(path)` returns (file or bytes, name for messages) and decodes nothing. It raises
    DataError for an image that is not there or outside its folder, and OSError.
    """

    sample: Sample
    find: Callable[[Path], tuple[Path | bytes, str]]

    def read(self, *, colour_profiles: bool = True) -> Sample:
        """The sample with its images as RGB, and its clips located, of which nothing is decoded.

        Raises DataError that names the image or clip, and OSError.
        """
        pixels = 0

        def read(part: Part) -> Part:
            nonlocal pixels
            if isinstance(part, ClipFile) and isinstance(part.file, Path):
                content, name = self.find(part.file)
                return replace(part, file=content, name=name)
            if not isinstance(part, SampleImage) or not isinstance(part.image, Path):
                return part
            content, name = self.find(part.image)
            image = read_sample_image(content, name, colour_profiles=colour_profiles)
            pixels = check_pixels(pixels + image.width * image.height)
            return SampleImage(image, part.role)

        return self.sample.with_parts(read)


def check_pixels(pixels: int) -> int:
    """The pixels of all images of a sample so far, or of all its frames. Raises DataError."""
    if pixels > MAX_SAMPLE_PIXELS:
        raise DataError(
            f"the images of the sample have more than {MAX_SAMPLE_PIXELS:,} pixels together; "
            "make them smaller, or split the record"
        )
    return pixels


def files_in(root: Path) -> Callable[[Path], tuple[Path, str]]:
    """The `find` of images and clips that are files below a folder, links followed."""
    return lambda path: (file_inside(path, root), path.name)


def read_sample_image(
    source: Path | bytes, name: str, *, colour_profiles: bool = True
) -> Image.Image:
    """Read a file or its bytes; DataError that names it once."""
    try:
        return read_image(source, colour_profiles=colour_profiles)
    except ImageError as error:
        # The reader names a file by its path, and bytes by no name.
        text = str(error)
        known = isinstance(source, Path) and str(source) in text
        reason = text.replace(str(source), "…") if known else text.removeprefix("the image: ")
        raise DataError(
            text if known else f"{name}: {text.removeprefix('the image: ')}",
            reason_of(ValueError(reason)),
        ) from error


def file_inside(path: Path, root: Path) -> Path:
    """The path, once links are followed, if it lies below the root."""
    try:
        base, resolved = root.resolve(), path.resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # links in a circle; names no file can have
        raise DataError(
            f"the file {path.name[:80]!r} cannot be found: {error}"[:300],
            "the file … cannot be found",
        ) from error
    if not resolved.is_relative_to(base):
        raise DataError(
            f"the file {path.name} lies outside the data folder {root}; name the folder of the "
            "files in the recipe (images = FOLDER beside path)",
            "the file … lies outside the data folder",
        )
    if resolved.exists() and not resolved.is_file():  # opening a pipe would wait for its writer
        raise DataError(f"{path.name[:80]!r} is not a file")
    if "\\" in path.name and not resolved.exists():
        raise DataError(
            f"there is no file {path.name}; paths are written with /", "there is no file …"
        )
    return resolved


def blob_or_file(root: Path, blobs: Blobs, path: Path) -> tuple[Path | bytes, str]:
    """The bytes of an image or clip in a record, or the file that it names."""
    if path.parent == root and path.name in blobs:
        return blobs[path.name], IN_RECORD
    return file_inside(path, root), path.name
