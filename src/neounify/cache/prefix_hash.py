"""Content keys of cached tokens, and hashes of the blocks they fill."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

BlockHash = bytes
HASH_BYTES = 16


class TokenKey(NamedTuple):
    """Identity of one token of the understanding stream.

    `key` is its content, `t` its position, `starts` whether a sequence may be continued in front
    of it: not inside an image, whose tokens see each other.
    """

    key: bytes
    t: int
    starts: bool


def text_keys(ids: Sequence[int], t: int) -> list[TokenKey]:
    """Keys of text that starts at position `t`."""
    return [TokenKey(b"t%d" % token, t + n, True) for n, token in enumerate(ids)]


def image_keys(digest: bytes, count: int, t: int) -> list[TokenKey]:
    """Keys of a clean image of `count` tokens at position `t`; `digest` is that of its pixels."""
    return [TokenKey(b"i%d " % n + digest, t, n == 0) for n in range(count)]


def block_hash(previous: BlockHash, keys: Sequence[TokenKey]) -> BlockHash:
    """Hash of a full block: of its tokens' keys and of the hash of the block before it."""
    digest = hashlib.blake2b(previous, digest_size=HASH_BYTES)
    for token in keys:
        digest.update(b"%d:" % len(token.key) + token.key)
    return digest.digest()


def block_hashes(
    keys: Sequence[TokenKey], block_size: int, known: Sequence[BlockHash] = ()
) -> list[BlockHash]:
    """Hashes of all full blocks of a sequence; `known` are those of the first ones."""
    hashes = list(known)
    for start in range(len(hashes) * block_size, len(keys) - block_size + 1, block_size):
        previous = hashes[-1] if hashes else b""
        hashes.append(block_hash(previous, keys[start : start + block_size]))
    return hashes
