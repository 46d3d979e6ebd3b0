"""Boxes of MP4 files (ISO/IEC 14496-12): XMP metadata, written and read."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
"""Identifies the box of an XMP packet, by the XMP specification (ISO 16684-1)."""
MAX_BOXES = 10_000
"""Boxes that are walked; a file has a handful on its top level, or two for each fragment."""
MAX_XMP_BYTES = 2**20
"""Largest packet that is read."""


def xmp_box(packet: bytes) -> bytes:
    """A box of an XMP packet, to stand at the end of a file."""
    return struct.pack(">I4s", 24 + len(packet), b"uuid") + XMP_UUID + packet


def is_mp4(head: bytes) -> bool:
    """Whether a file that begins with `head` is MP4 or QuickTime, by its first box."""
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def find_xmp(file: IO[bytes]) -> bytes:
    """The XMP packet of an MP4 file; empty without one, also where boxes are damaged."""
    for kind, start, size in top_boxes(file):
        if kind == b"uuid" and 16 < size <= MAX_XMP_BYTES + 16:
            file.seek(start)
            content = file.read(size)
            if content.startswith(XMP_UUID):
                return content[16:]
    return b""


def top_boxes(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """(type, start of the content, its size) of every box on the top level, while they fit."""
    end = file.seek(0, 2)
    for kind, start, size in stated_boxes(file):
        if start + size <= end:
            yield kind, start, size


def stated_boxes(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of `top_boxes`, and one that goes beyond the end of the file."""
    end = file.seek(0, 2)
    position = 0
    for _ in range(MAX_BOXES):
        file.seek(position)
        head = file.read(16)
        if len(head) < 8:
            return
        size, kind, length = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, length = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:
            size = end - position
        if size < length:
            return
        yield kind, position + length, size - length
        position += size
        if position >= end:  # also where no file is so long that it can be sought
            return
