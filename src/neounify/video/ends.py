"""End of a video file by the sizes that its container states, to tell files that are cut off."""

from __future__ import annotations

from typing import IO

from neounify.video.boxes import is_mp4, stated_boxes

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
"""Marks of the two elements that a Matroska file is made of."""
_BOXES = (b"moov", b"moof", b"mdat")
MAX_CHUNKS = 10_000
"""RIFF chunks of an AVI file that are walked; each holds up to 2 GB."""


def stated_end(file: IO[bytes]) -> int:
    """The byte at which a file ends by its own account; 0 where its container does not say.

    MP4 states the size of every box, Matroska of its segment, AVI of its RIFF chunks, unless they
    were written to a pipe; GIF nothing. Of MP4 the boxes of frames and of their index count.
    """
    file.seek(0)
    head = file.read(64)
    if is_mp4(head):
        return max(
            (start + size for kind, start, size in stated_boxes(file) if kind in _BOXES), default=0
        )
    if head.startswith(_EBML):
        return _end_of_segment(head)
    return _end_of_chunks(file) if head.startswith(b"RIFF") else 0


def _end_of_segment(head: bytes) -> int:
    """Where the segment of a Matroska file ends, from its first bytes."""
    start, size = _element(head, len(_EBML))
    segment = start + size
    if head[segment : segment + len(_SEGMENT)] != _SEGMENT:
        return 0
    start, size = _element(head, segment + len(_SEGMENT))
    return start + size if size else 0


def _element(data: bytes, position: int) -> tuple[int, int]:
    """(start, size) of the content of an EBML element whose size stands here; 0: not stated."""
    if position >= len(data) or not data[position]:
        return position, 0
    length = 9 - data[position].bit_length()
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(data[position : position + length], "big") & unknown
    return position + length, 0 if size == unknown else size


def _end_of_chunks(file: IO[bytes]) -> int:
    """Where the last RIFF chunk of an AVI file ends."""
    end = 0
    for _ in range(MAX_CHUNKS):
        file.seek(end)
        head = file.read(8)
        size = int.from_bytes(head[4:], "little")
        if not head.startswith(b"RIFF") or not size:
            break
        end += 8 + size + size % 2
    return end
