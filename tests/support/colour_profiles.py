"""Small ICC profiles for tests, built byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence

D50 = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""XYZ of red, green and blue, adapted to D50."""

SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def rgb_profile(
    primaries: Sequence[Sequence[float]], curve: Sequence[float] = SRGB_CURVE, padding: int = 0
) -> bytes:
    """A matrix profile; `curve` is (gamma, a, b, c, d), `padding` bytes of text are added."""
    tags = {
        name: _xyz(value)
        for name, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(curve))
    return _profile(b"RGB ", tags, padding)


def grey_profile(gamma: float) -> bytes:
    """A grey profile of one gamma."""
    return _profile(b"GRAY", {b"kTRC": _curve((gamma, 1, 0, 1, 0))})


def cmyk_profile(inks: Sequence[tuple[float, float, float]]) -> bytes:
    """A CMYK profile (input only): Lab of each of the 16 combinations of full inks, K fastest."""
    nodes = b"".join(
        struct.pack(">HHH", round(l * 652.8), round((a + 128) * 256), round((b + 128) * 256))
        for l, a, b in inks  # noqa: E741
    )
    linear = struct.pack(">HH", 0, 65535)
    identity = b"".join(struct.pack(">i", 65536 * (n % 4 == 0)) for n in range(9))
    head = b"mft2\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + struct.pack(">HH", 2, 2)
    table = head + linear * 4 + nodes + linear * 3
    return _profile(b"CMYK", {b"A2B0": table}, space=b"Lab ", kind=b"prtr")


def _profile(
    colours: bytes,
    tags: dict[bytes, bytes],
    padding: int = 0,
    space: bytes = b"XYZ ",
    kind: bytes = b"mntr",
) -> bytes:
    tags = {b"wtpt": _xyz(D50), b"cprt": b"text\0\0\0\0" + b"x" * padding + b"\0", **tags}
    start = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I", start + len(body)) + b"\0\0\0\0\x02\x40\0\0" + kind + colours + space
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + b"".join(map(_fixed, D50))
    return head.ljust(128, b"\0") + table + body


def _xyz(value: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, value))


def _curve(values: Sequence[float]) -> bytes:
    return b"para\0\0\0\0\0\3\0\0" + b"".join(map(_fixed, values))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def chained_profile(elements: int) -> bytes:
    """An RGB profile with a chain of matrices, each of which does nothing."""
    element = b"matf\0\0\0\0" + struct.pack(">HH12f", 3, 3, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    entry = struct.pack(">II", 16 + 8 * elements, len(element))
    chain = b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, elements) + entry * elements + element
    return _profile(b"RGB ", {b"D2B1": chain}, space=b"Lab ")
