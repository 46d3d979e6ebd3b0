"""What the rows of a sequence hold, as far as two sequences can be told apart by it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

Name = bytes
NAME_BYTES = 16


class Row(NamedTuple):
    """One token of the understanding stream.

    `key` tells it from others in its place, `t` is its position, `starts` whether a sequence may
    be continued in front of it: not inside an image, whose tokens see each other.
    """

    key: bytes
    t: int
    starts: bool


def text_rows(ids: Sequence[int], t: int) -> list[Row]:
    """Rows of text that starts at position `t`."""
    return [Row(b"t%d" % token, t + n, True) for n, token in enumerate(ids)]


def image_rows(digest: bytes, count: int, t: int) -> list[Row]:
    """Rows of a clean image of `count` tokens at position `t`; `digest` stands for its pixels."""
    return [Row(b"i%d " % n + digest, t, n == 0) for n in range(count)]


def block_name(before: Name, rows: Sequence[Row]) -> Name:
    """The name of a full block: a hash of its rows and of all that came before it."""
    digest = hashlib.blake2b(before, digest_size=NAME_BYTES)
    for row in rows:
        digest.update(b"%d:" % len(row.key) + row.key)
    return digest.digest()
