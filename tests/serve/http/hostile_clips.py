"""Clips that mean to cost a server memory or time, by name."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from support.clips import clip_bytes, gif, numbered, of_streams


@cache
def clips() -> dict[str, bytes]:
    """Files of less than 600 KB each."""
    plain = clip_bytes(numbered(20))
    return {
        "a gif of 8 times 9 MP": gif((3000, 3000), 8),
        "a gif of 36 MP": gif((5500, 6500), 1),
        "a gif that says 65535x65535": _patched(gif((8, 8), 2), b"GIF8", 2, "<HH", 65535, 65535),
        "a gif of 20k frames": gif((1, 1), 20_000),
        "a clip of 4k frames": clip_bytes([np.zeros((16, 16, 3), np.uint8)] * 4000),
        "a clip of 16 MP": clip_bytes([np.zeros((4096, 4096, 3), np.uint8)] * 2),
        "a table of 80M frames": _patched(
            _patched(plain, b"stsz", 4, ">II", 1, 80_000_000), b"stsc", 12, ">I", 80_000_000
        ),
        "4 billion times": _patched(plain, b"stts", 8, ">I", 2**32 - 1),
        "a box that ends far away": _patched(plain, b"mdat", -8, ">I", 2**31 - 1),
        "a thousand streams": of_streams(1000),
        "a playlist": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"
        + b"#EXTINF:1,\na.ts\n" * 20_000,
        "500k boxes": plain[:32] + b"\0\0\0\x08free" * 60_000,
        "nested boxes": b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + _nested(20_000),
        "zeros": bytes(500_000),
        "an empty clip": b"",
        "half a clip": plain[: len(plain) // 2],
    }


def video_bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Bodies of /v1/videos, by name."""
    bodies: dict[str, dict[str, Any]] = {
        "no end of seconds": {"seconds": 1e308, "fps": 240},
        "frames without end": {"frames": 10**18},
        "a rate of nothing": {"seconds": 1, "fps": 1e-320},
        "a wall": {"size": "999968x999968", "frames": 4},
        "a thousand steps": {"frames": 4, "steps": 1000},
        "a prompt of 900k": {"prompt": "x " * 450_000},
        "a list for a size": {"size": [64] * 100_000},
    }
    for name, fields in bodies.items():
        yield f"a video of {name}", {"prompt": "x"} | fields


def _patched(data: bytes, mark: bytes, offset: int, form: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, data.index(mark) + len(mark) + offset, *values)
    return bytes(changed)


def _nested(depth: int) -> bytes:
    return b"".join(struct.pack(">I4s", 8 * (depth - n), b"moov") for n in range(depth))
