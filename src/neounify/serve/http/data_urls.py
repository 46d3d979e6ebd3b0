"""Data URLs as clients write them, which is often not as RFC 2397 would have it."""

from __future__ import annotations

import binascii
from urllib.parse import unquote_to_bytes

from neounify.errors import ImageError

_MAX_HEAD = 300
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
    percent signs are all read; so is content that is not base64. Raises ImageError for what
    cannot be read and for a media type that is no image's.
    """
    head, comma, content = url.strip().partition(",")
    if not is_data_url(head) or not comma or len(head) > _MAX_HEAD:
        raise ImageError(_RULE)
    kind, *parameters = [part.strip().lower() for part in head[5:].split(";")]
    if kind == "base64":
        kind, parameters = "", ["base64"]
    if kind not in ("", "application/octet-stream") and not kind.startswith("image/"):
        raise ImageError(f"image_url holds {kind[:40]}, not an image")
    data = _raw(content)
    if "base64" in parameters:
        return _from_base64(data)
    try:
        return _from_base64(data)
    except ImageError:
        return data


def _raw(content: str) -> bytes:
    try:
        return unquote_to_bytes(content) if "%" in content else content.encode("ascii")
    except UnicodeEncodeError as error:
        raise ImageError(
            f"image_url is not valid base64: it holds {content[error.start]!r}"
        ) from None


def _from_base64(data: bytes) -> bytes:
    text = data.translate(_STANDARD, delete=_SPACE).rstrip(b"=")
    wrong = text.translate(None, delete=_ALPHABET)
    if wrong:
        raise ImageError(f"image_url is not valid base64: it holds {chr(wrong[0])!r}")
    if len(text) % 4 == 1:
        raise ImageError(f"image_url is not valid base64: {len(text)} characters are cut off")
    return binascii.a2b_base64(text + b"=" * (-len(text) % 4))
