"""Special tokens by name, and the byte-level alphabet of vocabularies."""

from __future__ import annotations

from functools import cache

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IMAGE_OPEN = "<img>"
IMAGE_CLOSE = "</img>"
END_OF_TEXT = "<|endoftext|>"

REQUIRED = (IM_START, IM_END, THINK_OPEN, THINK_CLOSE, IMAGE_CONTEXT, IMAGE_OPEN, IMAGE_CLOSE)
"""A tokenizer without all of these cannot drive a model."""

CONTROL = (IM_START, IM_END, IMAGE_CONTEXT, IMAGE_OPEN, IMAGE_CLOSE, END_OF_TEXT)
"""Tokens that steer the model: typed by a user they must never become the token itself."""


@cache
def byte_of_character() -> dict[str, int]:
    """Map each of the 256 alphabet characters to its byte (0..255).

    Printable Latin-1 bytes stand for themselves; the others, in rising order, are
    spelled with the characters from U+0100 on, so that no token holds a space or a
    control character.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in sorted(printable)}
    table.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return table


def token_bytes(token: str) -> bytes:
    """Return the raw bytes of a vocabulary token; one outside the alphabet is plain text."""
    table = byte_of_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        return token.encode("utf-8")
