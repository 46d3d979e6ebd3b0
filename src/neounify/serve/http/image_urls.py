"""Images by URL: data URLs as clients write them, and fetching from hosts that are allowed.

Clients often write data URLs otherwise than RFC 2397. Fetching is off unless the operator names the
hosts, because a URL can make the server call its own neighbours: the host must be on the list,
every address it resolves to must be public, the connection goes to the address that was checked
(not to the name, which may resolve to another one a moment later), redirects are checked like first
addresses, and bytes and seconds are bounded.
"""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

import h11

from neounify.errors import ImageError
from neounify.serve.client import within

MAX_ESCAPED = 4 * 2**20
"""Maximum characters of a URL in which every character may be percent-encoded."""

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


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its IP addresses."""
MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_CHUNK = 64 * 1024


def is_data_url(url: str) -> bool:
    """Whether `url` is a data URL."""
    return url.lstrip()[:5].lower() == "data:"


def data_url_bytes(url: str) -> bytes:
    """The file inside a data URL.

    Upper case, a missing media type, missing padding, the URL-safe alphabet, white space and
    percent-encoding are all read; so is content that is not base64, up to MAX_ESCAPED characters.
    Raises ImageError for invalid URLs and for media types other than images.
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
    """The decoded content; piece by piece, as copies of all would take several times the memory."""
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
    """The content from `start` on, percent-decoded."""
    while start < len(url):
        piece = url[start : start + _PIECE]
        cut = piece.find("%", len(piece) - 2)
        if cut > 0 and start + len(piece) < len(url):  # its two digits are in the next piece
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
    for escaped, character in _ESCAPED_SIGNS:  # unquoting megabytes takes seconds
        data = data.replace(escaped, character)
    return data


@dataclass(frozen=True)
class _Target:
    """The parts of a URL whose host is allowed."""

    secure: bool
    host: str
    port: int
    path: str


def is_public(address: Address) -> bool:
    """Whether an address is public, also as IPv4 mapped into IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        wrapped = address.sixtofour is not None or address.teredo is not None
        if wrapped or address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast


async def resolve_host(host: str, port: int) -> list[str]:
    """All IP addresses of a host."""
    loop = asyncio.get_running_loop()
    entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


class ImageFetcher:
    """HTTP client that fetches from `hosts` only ("host": the default ports, or "host:port")."""

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        max_bytes: int,
        seconds: float,
        resolve: Resolve = resolve_host,
        allowed: Callable[[Address], bool] = is_public,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes, self._seconds = max_bytes, seconds
        self._resolve, self._allowed = resolve, allowed

    async def fetch(self, url: str) -> bytes:
        """The body at `url`. Raises ImageError if it is not allowed or fails."""
        try:
            return await within(self._follow(url), self._seconds)
        except TimeoutError:
            raise ImageError(f"the image URL took more than {self._seconds:g} seconds") from None
        except (OSError, h11.ProtocolError, UnicodeError) as error:
            raise ImageError("the image URL could not be fetched") from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            body, location = await self._get(self._target(url))
            if location is None:
                return body
            url = urljoin(url, location)
        raise ImageError(f"the image URL redirects more than {MAX_REDIRECTS} times")

    def _target(self, url: str) -> _Target:
        if not self._hosts:
            raise ImageError("this server fetches no image URLs; send the image as a data URL")
        parts, port = _split(url)
        host = (parts.hostname or "").rstrip(".")
        names = {f"{host}:{port}"} | ({host} if port == _PORTS[parts.scheme] else set())
        if not names & self._hosts:
            raise ImageError("the host of the image URL is not on this server's list")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(parts.scheme == "https", host, port, path)

    async def _get(self, target: _Target) -> tuple[bytes, str | None]:
        """(body, location of a redirect or None)."""
        address = await self._address(target)
        tls = ssl.create_default_context() if target.secure else None
        name = target.host if target.secure else None
        reader, writer = await asyncio.open_connection(
            address, target.port, ssl=tls, server_hostname=name
        )
        try:
            writer.write(_request(connection := h11.Connection(h11.CLIENT), target))
            await writer.drain()
            return await self._read(connection, reader)
        finally:
            writer.close()

    async def _address(self, target: _Target) -> str:
        addresses = await self._resolve(target.host, target.port)
        if not addresses or not all(self._allowed(ipaddress.ip_address(a)) for a in addresses):
            raise ImageError("the host of the image URL has an address that is not public")
        return addresses[0]

    async def _read(
        self, connection: h11.Connection, reader: asyncio.StreamReader
    ) -> tuple[bytes, str | None]:
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                headers = dict(event.headers)
                if 300 <= event.status_code < 400 and b"location" in headers:
                    return b"", headers[b"location"].decode("ascii")
                if event.status_code != 200:
                    raise ImageError(f"the image URL answers with status {event.status_code}")
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._max_bytes:
                    raise ImageError(f"the image URL holds more than {self._max_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body), None
            elif not isinstance(event, h11.InformationalResponse):
                raise ImageError("the image URL could not be fetched")


def _split(url: str) -> tuple[SplitResult, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ImageError("the image URL cannot be read") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ImageError("image_url must be a data URL, or begin with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ImageError("the image URL holds a name or a password")
    return parts, _PORTS[parts.scheme] if port is None else port


def _request(connection: h11.Connection, target: _Target) -> bytes:
    headers = [
        ("Host", f"{target.host}:{target.port}"),
        ("User-Agent", "neounify"),
        ("Accept", "image/*"),
        ("Connection", "close"),
    ]
    request = h11.Request(method="GET", target=target.path, headers=headers)
    return (connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b"")
