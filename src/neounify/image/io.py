"""Untrusted image files: every kind becomes an sRGB image.

Files are recognised by content, their pixel count is checked before they are decoded,
and only plain image formats are read at all: PIL knows others that run programs. Metadata never
decides whether a file is read.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageFile

from neounify.errors import ImageError
from neounify.files import read_bytes
from neounify.image.formats import (
    MAX_PROFILE_BYTES,
    SIGNATURE,
    check_avif,
    essential_png,
    isobmff_format,
    open_heif,
    to_rgb,
    to_srgb,
)
from neounify.image.pixels import check_aspect

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are always read, by PIL's names; AVIF and HEIC need a decoder."""

MAX_DECODED_PIXELS = 178_956_970
"""Largest image that is decoded, in pixels: half a gigabyte as RGB. PIL's own limit."""

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Largest file that is read, in bytes."""

ImageSource = str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image
"""A path, the bytes of a file, an open binary file, or a PIL image."""

# A JPEG with several images inside opens as MPO; its first image is the JPEG.
_OPENED_FORMATS = (*FORMATS, "AVIF", "HEIF", "MPO")

_PNG_DEPTH_BYTE = 24
_STRIP_PIXELS = 2**20
"""Pixels that are converted at a time where an image is reduced."""
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Silencing warnings changes the whole process: two threads at once would undo each other wrongly.
_quiet_lock = threading.Lock()


def read_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_DECODED_PIXELS,
    colour_profiles: bool = True,
    budget: DecodeBudget | None = None,
) -> Image.Image:
    """Read an image as sRGB: upright by its EXIF orientation, transparency laid on white.

    Animations give their first frame. Greys of 16 bits are scaled to 8, not clipped. Colours
    with an embedded ICC profile are converted to sRGB; a profile that cannot be used is ignored.

    Args:
        source: a path, the bytes of a file, a binary file object, or a PIL image.
        max_pixels: largest image that is decoded, in pixels; PIL may refuse above
            MAX_DECODED_PIXELS on its own.
        colour_profiles: False takes all pixels for sRGB, as the published code does.
        budget: bounds what decoding costs, and reduces large images; for the bytes of files only.

    Returns:
        A new RGB image without metadata.

    Raises:
        ImageError: missing, not an image of a known format, damaged, cut off, empty, or too
            large.
    """
    if isinstance(source, Image.Image):
        name, image = "the image", source
        if isinstance(source, ImageFile.ImageFile) and source.format not in _OPENED_FORMATS:
            raise ImageError(f"{name}: {source.format} files are not read; use {_formats()}")
    else:
        name, data = _read_bytes(source)
        if budget is not None:
            budget.check_format(data, name)
        image = _open(data, name)
    _check_pixels(image, name, max_pixels)
    if budget is not None and not isinstance(source, Image.Image):
        budget.admit(image, data, name)
    try:
        rgb = _decode(image, 1 if budget is None else budget.factor(image), colour_profiles)
    except ImageError:
        raise
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ImageError(f"{name}: damaged or cut off ({error})") from error
    rgb.info = {}  # EXIF may hold GPS positions and names: drop it
    return rgb


def _decode(image: Image.Image, factor: int, colour_profiles: bool) -> Image.Image:
    """The pixels as upright sRGB, their sides divided by `factor` in strips, never as a whole."""
    width = image.width
    if factor > 1:  # a JPEG's decoder reduces by up to 8, others decode everything
        image.draft(None, (-(-width // factor), -(-image.height // factor)))
    image.load()
    profile, orientation = _profile(image), _orientation(image)

    def convert(part: Image.Image) -> Image.Image:
        return to_rgb(to_srgb(part, profile) if colour_profiles else part)

    factor = max(1, factor * image.width // width)
    rgb = convert(image) if factor == 1 else _reduced(image, factor, convert)
    return rgb if orientation is None else rgb.transpose(orientation)


def _reduced(
    image: Image.Image, factor: int, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """The converted image with its sides divided by `factor`, by the mean of each square."""
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    rows = image.height
    if image.mode != "F":  # whose range decides how all of its pixels are read
        rows = max(1, _STRIP_PIXELS // (image.width * factor)) * factor
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(convert(part).reduce(factor), (0, top // factor))
    return result


def _read_bytes(source: object) -> tuple[str, bytes]:
    """A name for errors, and the content, at most MAX_FILE_BYTES."""
    if isinstance(source, bytes | bytearray | memoryview):
        name, data = "the image", bytes(source)
    elif isinstance(source, str | PathLike):
        name, data = _read_path(source)
    elif hasattr(source, "read"):
        name, data = "the image file", _read_stream(source)
    else:
        raise ImageError(
            f"an image is a path, bytes, a binary file or a PIL image, not {type(source).__name__}"
        )
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{name}: larger than {MAX_FILE_BYTES} bytes, the largest size allowed")
    if not data:
        raise ImageError(f"{name}: empty")
    return name, data


def _read_path(source: str | PathLike[str]) -> tuple[str, bytes]:
    path = Path(source)
    try:
        if not path.exists():
            raise ImageError(f"{path}: no such file")
        if not path.is_file():
            raise ImageError(f"{path}: not a file")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(f"{str(path)!r}: cannot be read ({error})") from error
    return str(path), read_bytes(path, MAX_FILE_BYTES, ImageError)


def _read_stream(source: Any) -> bytes:
    try:
        data = source.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a closed file
        raise ImageError(f"the image file: cannot be read ({error})") from error
    if not isinstance(data, bytes):
        raise ImageError("the image file: must be opened in binary mode")
    return data


def _profile(image: Image.Image) -> bytes | None:
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else None


def read_metadata(source: bytes | str | PathLike[str], keys: Sequence[str]) -> dict[str, Any]:
    """Metadata of an image (Pillow's `info`), without decoding its pixels.

    Of a PNG's text chunks, those of `keys` alone. Raises ImageError as `read_image` does.
    """
    name, data = _read_bytes(source)
    return {str(key): value for key, value in _open(data, name, keys).info.items()}


@dataclass(frozen=True)
class ImageFacts:
    """Facts of a file, in Pillow's words: format, mode, (width, height) as stored, frames."""

    format: str
    mode: str
    size: tuple[int, int]
    frames: int


def describe_image(source: bytes | str | PathLike[str]) -> ImageFacts:
    """Facts of an image, without decoding its pixels. Raises ImageError as `read_image` does."""
    name, data = _read_bytes(source)
    image = _open(data, name)
    try:
        frames = int(getattr(image, "n_frames", 1))  # of an animation, whose frames are walked
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ImageError(f"{name}: damaged or cut off ({error})") from error
    return ImageFacts(str(image.format), image.mode, image.size, frames)


def _open(data: bytes, name: str, keys: Sequence[str] = ()) -> Image.Image:
    container = isobmff_format(data)
    if container == "HEIC":
        with _quiet():
            return open_heif(data, name)
    if container == "AVIF":
        check_avif(name)
    profile: bytes | None = None
    if data.startswith(SIGNATURE):
        data, profile = essential_png(data, MAX_PROFILE_BYTES, keys)
    formats = FORMATS if container is None else (container,)
    try:
        with _quiet():
            image = Image.open(MeteredFile(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too many pixels to decode: {error}") from error
    except ImageError as error:  # of MeteredFile
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:
        raise ImageError(f"{name}: not an image, or damaged; use {_formats()}") from error
    if image.format == "PNG":
        _scale_transparent_colour(image, depth=data[_PNG_DEPTH_BYTE])
        image.info["icc_profile"] = profile
    return image


def _scale_transparent_colour(image: Image.Image, depth: int) -> None:
    """Bring the transparent colour of a PNG to 8 bits, as PIL brings its pixels but not this."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int) and depth in (2, 4):
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(colour, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels, its size is {width}x{height}")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} is {width * height} pixels; at most {max_pixels} are decoded"
        )


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns an image upright, None if it is."""
    try:
        with _quiet():
            orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken EXIF data is no reason to refuse the image
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _formats() -> str:
    return ", ".join(FORMATS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PIL's warnings about odd files to itself; what matters becomes an error here."""
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- decoding budget: memory, time and reads ---

MAX_READS = 200_000
"""Reads of one file by Pillow's parsers, which walk it in Python: some 0.3 s of work."""

_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2, "F": 16}
_OTHER_MODE_BYTES = 4
"""Bytes of a decoded pixel by Pillow's mode; floats are converted by way of three copies."""

_DECODER_BYTES = {"WEBP": 16, "AVIF": 10, "HEIF": 8}
"""Bytes that a decoder takes for each pixel, beside which the mode's do not count; measured."""

_DCT_BYTES, _DCT_SAMPLES = 2, 3
"""A progressive JPEG keeps all coefficients of all components until its last scan."""

_SCAN_SHARE = 0.04
"""Time of one scan of a progressive JPEG as a share of decoding the pixels once; measured."""

_SLOW_FORMATS = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    **{b"P%d" % number: "PPM" for number in range(1, 8)},
}
_READ = "PNG, JPEG, WebP, GIF, BMP, AVIF or HEIC"


class MeteredFile(BytesIO):
    """A file in memory that fails after MAX_READS reads: no sound file is cut into more pieces."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ImageError."""
        self._reads += 1
        if self._reads > MAX_READS:
            raise ImageError(f"cut into more than {MAX_READS} pieces")
        return super().read(size)


class DecodeBudget:
    """Budget of all images of one request; not for several threads at a time.

    `max_pixels` bounds the time: pixels of all images, by their formats' speed. `max_bytes` bounds
    the memory of each while it is decoded, its file included. Images are reduced by whole factors
    while they are decoded, to no fewer than `keep_pixels`.
    """

    def __init__(self, *, max_pixels: int, max_bytes: int, keep_pixels: int) -> None:
        self._max_pixels, self._max_bytes = max_pixels, max_bytes
        self._keep_pixels = keep_pixels
        self._left = float(max_pixels)
        self.last_bytes = 0
        """Bytes that decoding the last image took."""

    def check_format(self, data: bytes, name: str) -> None:
        """Raise ImageError for formats whose small files can take long to decode."""
        for magic, kind in _SLOW_FORMATS.items():
            if data.startswith(magic):
                raise ImageError(f"{name}: {kind} files are not read here; send {_READ}")

    def admit(self, image: Image.Image, file: bytes, name: str) -> None:
        """Count an image that was opened and not yet decoded. Raises ImageError over the limits."""
        check_aspect(image.height, image.width)
        # Twice: there is a copy as a data URL or without metadata.
        needed = 2 * len(file) + _decoding_bytes(image, self.factor(image))
        if needed > self._max_bytes:
            raise ImageError(
                f"{name}: decoding a {image.format} of {image.width}x{image.height} takes "
                f"{needed // 2**20} MiB; at most {self._max_bytes // 2**20} are allowed. Send it "
                "smaller, or as a baseline JPEG"
            )
        self.last_bytes = needed
        self._left -= _cost(image, file)
        if self._left < 0:
            raise ImageError(
                f"{name}: the images of a request may have {self._max_pixels:,} pixels together, "
                f"with this one they have {self._max_pixels - self._left:,.0f} (a quarter of its "
                "pixels counts for a JPEG); send fewer or smaller ones"
            )

    def factor(self, image: Image.Image) -> int:
        """Divisor of an image's sides."""
        return max(1, math.isqrt(image.width * image.height // self._keep_pixels))


def _decoding_bytes(image: Image.Image, factor: int) -> int:
    pixels = image.width * image.height
    pixel_bytes = _MODE_BYTES.get(image.mode, _OTHER_MODE_BYTES)
    if image.format in _DECODER_BYTES:
        return pixels * _DECODER_BYTES[image.format]
    if image.format not in ("JPEG", "MPO"):
        return pixels * pixel_bytes
    decoded = pixels * pixel_bytes // min(8, 1 << (factor.bit_length() - 1)) ** 2
    return decoded + (_coefficients(image) * _DCT_BYTES if _is_progressive(image) else 0)


def _cost(image: Image.Image, file: bytes) -> float:
    """Pixels that take as long as decoding this image."""
    pixels = image.width * image.height
    if image.format not in ("JPEG", "MPO"):
        return pixels
    if not _is_progressive(image):
        return pixels / 4
    return pixels * (0.5 + _SCAN_SHARE * file.count(b"\xff\xda"))


def _is_progressive(image: Image.Image) -> bool:
    return bool(image.info.get("progressive"))


def _coefficients(image: Image.Image) -> int:
    """Samples of all components, with those that hold fewer than a pixel each."""
    layers: Any = getattr(image, "layer", None)
    pixels = image.width * image.height
    try:
        sizes = [across * down for _, across, down, *_ in layers]
        return math.ceil(pixels * sum(sizes) / max(sizes))
    except (TypeError, ValueError, ZeroDivisionError):
        return pixels * _DCT_SAMPLES
