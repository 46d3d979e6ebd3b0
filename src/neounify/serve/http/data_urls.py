"""Data URLs as clients write them, which is often not as RFC 2397 would have it."""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from neounify.errors import ImageError

MAX_ESCAPED = 4 * 2**20
"""Characters of a URL up to which any of them may be written as percent signs."""

_MAX_HEAD = 300
_PIECE = 2**18
_ESCAPED_SIGNS = (
    (b"%2B", b"+"),
    (b"%2b", b"+"),
    (b"%2F", b"/"),
    (b"%2f", b"/"),
    (b"%3D", b"="),
    (b"%3d", b"="),
    (b"%0A", b""),
    (b"%0a", b""),
    (b"%0D", b""),
    (b"%0d", b""),
    (b"%20", b""),
)
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\r\n\v\f"
_RULE = "image_url must be 'data:image/png;base64,…' or another image type"


def is_data_url(url: str) -> bool:
    """Whether a URL holds its content itself."""
    return url.lstrip()[:5].lower() == "data:"


def data_url_bytes(url: str) -> bytes:
    """The file inside a data URL.

    Upper case, a missing media type, missing padding, the URL-safe alphabet, white space and
    percent signs are all read; so is content that is not base64, up to MAX_ESCAPED characters.
    Raises ImageError for what cannot be read and for a media type that is no image's.
    """
    url = url.strip()
    start = url.find(",", 0, _MAX_HEAD) + 1
    if not is_data_url(url[:5]) or not start:
        raise ImageError(_RULE)
    kind, *parameters = [part.strip().lower() for part in url[5 : start - 1].split(";")]
    if kind == "base64":
        kind, parameters = "", ["base64"]
    if kind not in ("", "application/octet-stream") and not kind.startswith("image/"):
        raise ImageError(f"image_url holds {kind[:40]}, not an image")
    if "base64" in parameters or len(url) > MAX_ESCAPED:
        return _from_base64(url, start)
    try:
        return _from_base64(url, start)
    except ImageError:
        return b"".join(_pieces(url, start))


def _from_base64(url: str, start: int) -> bytes:
    """Decoded piece by piece: copies of the whole text would take several times its memory."""
    file: list[bytes] = []
    rest, count, ended = b"", 0, False
    for piece in _pieces(url, start):
        padded = piece.translate(_STANDARD, delete=_SPACE)
        text = padded.rstrip(b"=")
        wrong = text.translate(None, delete=_ALPHABET) or (b"=" if ended and text else b"")
        if wrong:
            raise ImageError(f"image_url is not valid base64: it holds {chr(wrong[0])!r}")
        ended = ended or len(text) < len(padded)
        count += len(text)
        text = rest + text
        whole = len(text) // 4 * 4
        file.append(binascii.a2b_base64(text[:whole]))
        rest = text[whole:]
    if len(rest) == 1:
        raise ImageError(f"image_url is not valid base64: {count} characters are cut off")
    file.append(binascii.a2b_base64(rest + b"=" * (-len(rest) % 4)))
    return b"".join(file)


def _pieces(url: str, start: int) -> Iterator[bytes]:
    """The content behind `start`, percent signs resolved."""
    while start < len(url):
        piece = url[start : start + _PIECE]
        cut = piece.find("%", len(piece) - 2)
        if cut > 0 and start + len(piece) < len(url):  # the two digits belong to it
            piece = piece[:cut]
        start += len(piece)
        try:
            data = piece.encode("ascii")
        except UnicodeEncodeError as error:
            raise ImageError(
                f"image_url is not valid base64: it holds {piece[error.start]!r}"
            ) from None
        yield _unquoted(data, len(url)) if b"%" in data else data


def _unquoted(data: bytes, length: int) -> bytes:
    if length <= MAX_ESCAPED:
        return unquote_to_bytes(data)
    for escaped, character in _ESCAPED_SIGNS:  # the general way takes seconds for megabytes
        data = data.replace(escaped, character)
    return data
