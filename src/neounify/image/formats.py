"""Single formats: PNG reduced to its pixels, and AVIF and HEIC where a decoder is installed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Literal

from PIL import Image, features

from neounify.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_METADATA_BYTES = 2**20
"""Largest unpacked metadata chunk that is passed on; Pillow refuses files with larger ones."""

MAX_CHUNKS = 200_000
"""Chunks of a file that are looked at; the rest is left to the decoder."""

MAX_METADATA_CHUNKS = 32
"""Metadata chunks that are unpacked: each may hold a thousand times its size."""

_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
# Text that may hold the orientation.
_ORIENTATION_KEYS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")


def essential_png(
    data: bytes, max_profile_bytes: int, keys: Sequence[str] = ()
) -> tuple[bytes, bytes | None]:
    """A PNG's pixels and orientation as a file of their own, and its ICC profile if it has one.

    Text chunks with one of `keys` are kept too, up to MAX_METADATA_BYTES each.
    A profile that is damaged or larger than `max_profile_bytes` counts as none. Where the chunks
    end unexpectedly, the rest is kept as it is: the decoder says what is wrong.
    """
    view, profile, start = memoryview(data), None, len(SIGNATURE)
    kept: list[bytes | memoryview] = [SIGNATURE]
    texts = (*_ORIENTATION_KEYS, *(key.encode("latin-1") for key in keys))
    metadata, dropped = 0, False
    for kind, content, stop in _chunks(view):
        before = len(kept)
        if kind in _PIXELS:
            kept.append(view[start:stop])
        elif metadata < MAX_METADATA_CHUNKS:
            if kind == b"iCCP":
                metadata += 1
                profile = profile or _profile(content, max_profile_bytes)
            elif _is_wanted(kind, content, texts):
                metadata += 1
                kept.append(view[start:stop])
        dropped = dropped or len(kept) == before
        start = stop
    if not dropped:
        return data, profile
    kept.append(view[start:])
    return b"".join(kept), profile


def _chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview, int]]:
    """(kind, content, first byte behind the chunk) of every whole chunk up to IEND."""
    start, kind = len(SIGNATURE), b""
    for _ in range(MAX_CHUNKS):
        if start + 12 > len(view) or kind == b"IEND":
            return
        length = int.from_bytes(view[start : start + 4], "big")
        kind, stop = bytes(view[start + 4 : start + 8]), start + 12 + length
        if stop > len(view):
            return
        yield kind, view[start + 8 : stop - 4], stop
        start = stop


def _is_wanted(kind: bytes, content: memoryview, texts: Sequence[bytes]) -> bool:
    """Whether a chunk is EXIF or one of `texts`, and small enough for any decoder."""
    if kind == b"eXIf":
        return len(content) <= MAX_METADATA_BYTES
    if kind not in _TEXT or len(content) > MAX_METADATA_BYTES:
        return False
    key, _, rest = bytes(content).partition(b"\0")
    if key not in texts:
        return False
    if kind == b"zTXt":
        return _unpacked(rest[1:], MAX_METADATA_BYTES) is not None
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
        return _unpacked(packed, MAX_METADATA_BYTES) is not None
    return True


def _profile(content: memoryview, max_bytes: int) -> bytes | None:
    # A name of at most 79 bytes, a zero, the method of compression (0), the packed profile.
    start = bytes(content[:81]).find(b"\0")
    if start < 0 or bytes(content[start + 1 : start + 2]) != b"\0":
        return None
    return _unpacked(content[start + 2 :], max_bytes)


def _unpacked(packed: bytes | memoryview, max_bytes: int) -> bytes | None:
    """The content of a zlib stream, None when it is damaged, cut off, or larger."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, max_bytes + 1)
    except zlib.error:
        return None
    return content if stream.eof and len(content) <= max_bytes else None


_AVIF = (b"avif", b"avis")
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_ANY = (b"mif1", b"msf1", b"mif2", b"miaf")
_MAX_BRANDS_BYTES = 256


def isobmff_format(data: bytes) -> Literal["AVIF", "HEIC"] | None:
    """Which of the two a file is by its brands, None for other files."""
    if data[4:8] != b"ftyp":
        return None
    length = min(int.from_bytes(data[:4], "big"), _MAX_BRANDS_BYTES, len(data))
    brands = [data[8:12], *(data[n : n + 4] for n in range(16, length, 4))]
    if any(brand in _AVIF for brand in brands):
        return "AVIF"
    return "HEIC" if any(brand in (*_HEIC, *_ANY) for brand in brands) else None


def check_avif(name: str) -> None:
    """ImageError, which says what to install, when this Pillow has no AVIF decoder."""
    if not features.check("avif"):
        raise ImageError(
            f"{name}: an AVIF file, which this Pillow cannot decode; install Pillow 11.3 or newer"
        )


def open_heif(data: bytes, name: str) -> Image.Image:
    """Open a HEIC file; its pixels are decoded when it is loaded.

    Raises ImageError when it is damaged or the decoder, pillow-heif, is not installed.
    """
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageError(
            f"{name}: a HEIC file, which needs a decoder: pip install pillow-heif"
        ) from error
    try:
        return HeifImageFile(BytesIO(data))
    except Exception as error:
        raise ImageError(f"{name}: not a whole HEIC file ({error})") from error
