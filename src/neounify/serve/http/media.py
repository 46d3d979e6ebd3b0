"""Input images: decoding within limits; data URLs and fetching, of clips too; stored results.

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
import re
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

import h11
import PIL.Image

from neounify.errors import ImageError, RequestError
from neounify.image.io import DecodeBudget, read_image
from neounify.runtime import return_freed_memory
from neounify.serve.client import within
from neounify.serve.http.config import HttpConfig
from neounify.serve.http.decoders import MediaDecoder
from neounify.serve.http.uploads import UploadBytes

MAX_ESCAPED = 4 * 2**20
"""Maximum characters of a URL in which every character may be percent-encoded."""
MAX_REDIRECTS = 3
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Medium = Literal["image", "video"]
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its IP addresses."""

# The unguessable name is the permission to fetch it: the host before it does not matter.
_RESULT_URL = re.compile(
    r"(?:https?://[^/?#\s]+(?:/[^?#\s]*)?)?/v1/results/([\w.-]{20,80})", re.ASCII
)
_LARGE_BYTES = 8 * 2**20
"""Memory of decoded images above this is returned to the system when it is freed."""
_MAX_HEAD = 300
"""Maximum characters of a data URL before its content."""
_PIECE = 2**18
"""Characters of a data URL that are decoded at a time."""
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
_EXAMPLES: dict[Medium, str] = {
    "image": "data:image/png;base64,…",
    "video": "data:video/mp4;base64,…",
}
_PORTS = {"http": 80, "https": 443}
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_CHUNK = 64 * 1024


# --- stored results ---


@dataclass(frozen=True)
class StoredResult:
    """A file, and when it expires, in seconds of the store's clock."""

    data: bytes
    media_type: str
    expires: float


class ResultStore:
    """Short-lived results behind unguessable URLs: files for `seconds`, the newest `max_bytes`."""

    def __init__(
        self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._seconds, self._clock = max_bytes, seconds, clock
        self._results: dict[str, StoredResult] = {}
        self._bytes = 0

    def put(self, data: bytes, media_type: str, suffix: str) -> str:
        """Keep a file. Its name, `TOKEN.suffix`. Raises RequestError if it exceeds the store."""
        if len(data) > self._max_bytes:
            raise RequestError(
                f"response_format url: the image has {len(data)} bytes, the server keeps "
                f"{self._max_bytes} at most; use b64_json",
                param="response_format",
            )
        name = f"{secrets.token_urlsafe(32)}.{suffix}"
        self._results[name] = StoredResult(data, media_type, self._clock() + self._seconds)
        self._bytes += len(data)
        self._drop_expired()
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._results)))
        return name

    def get(self, name: str) -> StoredResult | None:
        """The file of that name; None after it expired or made room for newer ones."""
        self._drop_expired()
        return self._results.get(name)

    def seconds_left(self, result: StoredResult) -> int:
        """Whole seconds until the file expires."""
        return max(0, int(result.expires - self._clock()))

    def _drop_expired(self) -> None:
        now = self._clock()
        # They are in order of arrival, and all are kept equally long.
        while self._results and next(iter(self._results.values())).expires <= now:
            self._drop(next(iter(self._results)))

    def _drop(self, name: str) -> None:
        self._bytes -= len(self._results.pop(name).data)


# --- input images ---


class RequestImages:
    """Reader of the input images of one request, within the limits of one request."""

    def __init__(
        self,
        decoder: MediaDecoder,
        fetcher: MediaFetcher,
        results: ResultStore,
        config: HttpConfig,
        keep_pixels: int,
    ) -> None:
        """Images are reduced to no fewer than `keep_pixels`."""
        limits = config.limits
        self._decoder, self._fetcher, self._results = decoder, fetcher, results
        self._config = config
        self._budget = DecodeBudget(
            max_pixels=limits.images_pixels,
            max_bytes=limits.decode_bytes,
            keep_pixels=keep_pixels,
        )

    async def read(self, data: bytes) -> PIL.Image.Image:
        """Decode a file. Raises ImageError for what is no image or exceeds the limits."""
        return await self._decoder.run(lambda: self._read(lambda: data))

    async def read_url(self, url: str) -> PIL.Image.Image:
        """The image in a data URL, a result of this server, or on a host that is allowed.

        Raises ImageError.
        """
        if is_data_url(url):
            return await self._decoder.run(lambda: self._read(lambda: data_url_bytes(url)))
        name = result_name(url)
        result = self._results.get(name) if name else None
        if result is not None:
            return await self.read(result.data)
        if name and not self._config.remote_hosts:
            raise ImageError(
                "image_url: this result is no longer kept; send the image as a data URL"
            )
        async with self._fetcher.fetched(url) as data:
            return await self.read(data)

    def _read(self, file: Callable[[], bytes]) -> PIL.Image.Image:
        limits = self._config.limits
        try:
            return read_image(
                file(),
                max_pixels=limits.image_pixels,
                colour_profiles=self._config.colour_profiles,
                budget=self._budget,
            )
        except ImageError as error:
            problem = str(error)
        finally:
            if self._budget.last_bytes > _LARGE_BYTES:
                return_freed_memory()
        # A new error: the frames of the caught one's traceback hold the file.
        raise ImageError(problem)


def result_name(url: str) -> str | None:
    """The name of a result in a URL such as this server gives; None for other URLs."""
    match = _RESULT_URL.fullmatch(url.strip())
    return match[1] if match else None


# --- data URLs ---


def is_data_url(url: str) -> bool:
    """Whether `url` is a data URL."""
    return url.lstrip()[:5].lower() == "data:"


def data_url_bytes(url: str, medium: Medium = "image") -> bytes:
    """The file of a `medium` inside a data URL.

    Upper case, a missing media type, missing padding, the URL-safe alphabet, white space and
    percent-encoding are all read; so is content that is not base64, up to MAX_ESCAPED characters.
    Raises ImageError for invalid URLs and for media types of others.
    """
    url = url.strip()
    start = url.find(",", 0, _MAX_HEAD) + 1
    if not is_data_url(url[:5]) or not start:
        example = _EXAMPLES[medium]
        raise ImageError(f"the URL of the {medium} must be {example!r} or another {medium} type")
    kind, *parameters = [part.strip().lower() for part in url[5 : start - 1].split(";")]
    if kind == "base64":
        kind, parameters = "", ["base64"]
    if kind not in ("", "application/octet-stream") and not kind.startswith(f"{medium}/"):
        article = "an" if medium == "image" else "a"
        raise ImageError(f"the URL of the {medium} holds {kind[:40]}, not {article} {medium}")
    if "base64" in parameters or len(url) > MAX_ESCAPED:
        return _from_base64(url, start, medium)
    try:
        return _from_base64(url, start, medium)
    except ImageError:
        return b"".join(_pieces(url, start, medium))


def _from_base64(url: str, start: int, medium: Medium) -> bytes:
    """The decoded content; piece by piece, as copies of all would take several times the memory."""
    file: list[bytes] = []
    rest, count, ended = b"", 0, False
    for piece in _pieces(url, start, medium):
        padded = piece.translate(_STANDARD, delete=_SPACE)
        text = padded.rstrip(b"=")
        wrong = text.translate(None, delete=_ALPHABET) or (b"=" if ended and text else b"")
        if wrong:
            raise ImageError(
                f"the URL of the {medium} is not valid base64: it holds {chr(wrong[0])!r}"
            )
        ended = ended or len(text) < len(padded)
        count += len(text)
        text = rest + text
        whole = len(text) // 4 * 4
        file.append(binascii.a2b_base64(text[:whole]))
        rest = text[whole:]
    if len(rest) == 1:
        raise ImageError(
            f"the URL of the {medium} is not valid base64: {count} characters are cut off"
        )
    file.append(binascii.a2b_base64(rest + b"=" * (-len(rest) % 4)))
    return b"".join(file)


def _not_base64(medium: Medium, problem: str) -> ImageError:
    return ImageError(f"the URL of the {medium} is not valid base64: {problem}")


def _pieces(url: str, start: int, medium: Medium) -> Iterator[bytes]:
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
            raise _not_base64(medium, f"it holds {piece[error.start]!r}") from None
        yield _unquoted(data, len(url)) if b"%" in data else data


def _unquoted(data: bytes, length: int) -> bytes:
    if length <= MAX_ESCAPED:
        return unquote_to_bytes(data)
    for escaped, character in _ESCAPED_SIGNS:  # unquoting megabytes takes seconds
        data = data.replace(escaped, character)
    return data


# --- fetching ---


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


class MediaFetcher:
    """HTTP client that fetches from `hosts` only ("host": the default ports, or "host:port").

    The bytes of fetched files count in `uploads` while they are used.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        max_bytes: int,
        seconds: float,
        uploads: UploadBytes,
        medium: Medium = "image",
        resolve: Resolve = resolve_host,
        allowed: Callable[[Address], bool] = is_public,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes, self._seconds, self._medium = max_bytes, seconds, medium
        self._uploads, self._resolve, self._allowed = uploads, resolve, allowed

    @asynccontextmanager
    async def fetched(self, url: str) -> AsyncIterator[bytes]:
        """Context of the body at `url`, which is counted until it ends.

        Raises ImageError if the URL is not allowed or fails, ApiError 429 for too many bytes of
        all requests.
        """
        with self._uploads.counting() as count:
            yield await self._fetch(url, count)

    async def _fetch(self, url: str, count: Callable[[int], None]) -> bytes:
        try:
            return await within(self._follow(url, count), self._seconds)
        except TimeoutError:
            raise ImageError(
                f"the {self._medium} URL took more than {self._seconds:g} seconds; send the "
                f"{self._medium} as a data URL, or a smaller file"
            ) from None
        except (OSError, h11.ProtocolError, UnicodeError) as error:
            raise ImageError(f"the {self._medium} URL could not be fetched") from error

    async def _follow(self, url: str, count: Callable[[int], None]) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            body, location = await self._get(self._target(url), count)
            if location is None:
                return body
            url = urljoin(url, location)
        raise ImageError(f"the {self._medium} URL redirects more than {MAX_REDIRECTS} times")

    def _target(self, url: str) -> _Target:
        if not self._hosts:
            raise ImageError(
                f"this server fetches no {self._medium} URLs; send the {self._medium} as a data URL"
            )
        parts, port = _split(url, self._medium)
        host = (parts.hostname or "").rstrip(".")
        names = {f"{host}:{port}"} | ({host} if port == _PORTS[parts.scheme] else set())
        if not names & self._hosts:
            raise ImageError(
                f"the {self._medium} URL's host {host[:100]!r} is not on this server's list"
            )
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(parts.scheme == "https", host, port, path)

    async def _get(self, target: _Target, count: Callable[[int], None]) -> tuple[bytes, str | None]:
        """(body, location of a redirect or None)."""
        address = await self._address(target)
        tls = await asyncio.to_thread(_tls_context) if target.secure else None
        name = target.host if target.secure else None
        reader, writer = await asyncio.open_connection(
            address, target.port, ssl=tls, server_hostname=name
        )
        try:
            writer.write(_request(connection := h11.Connection(h11.CLIENT), target, self._medium))
            await writer.drain()
            return await self._read(connection, reader, count)
        finally:
            writer.close()

    async def _address(self, target: _Target) -> str:
        addresses = await self._resolve(target.host, target.port)
        if not addresses or not all(self._allowed(ipaddress.ip_address(a)) for a in addresses):
            raise ImageError(
                f"the host of the {self._medium} URL has an address that is not public"
            )
        return addresses[0]

    async def _read(
        self,
        connection: h11.Connection,
        reader: asyncio.StreamReader,
        count: Callable[[int], None],
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
                    raise ImageError(
                        f"the {self._medium} URL answers with status {event.status_code}"
                    )
            elif isinstance(event, h11.Data):
                if len(body) + len(event.data) > self._max_bytes:
                    raise ImageError(
                        f"the {self._medium} URL holds more than {self._max_bytes} bytes; "
                        "send a smaller file"
                    )
                count(len(event.data))
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body), None
            elif not isinstance(event, h11.InformationalResponse):
                raise ImageError(f"the {self._medium} URL could not be fetched")


@cache
def _tls_context() -> ssl.SSLContext:
    """The system's certificates, whose reading takes long enough to be done in a thread once."""
    return ssl.create_default_context()


def _split(url: str, medium: Medium) -> tuple[SplitResult, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ImageError(f"the {medium} URL cannot be read") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ImageError(
            f"the URL of the {medium} must be a data URL, or begin with http:// or https://"
        )
    if parts.username is not None or parts.password is not None:
        raise ImageError(f"the {medium} URL holds a name or a password")
    return parts, _PORTS[parts.scheme] if port is None else port


def _request(connection: h11.Connection, target: _Target, medium: Medium) -> bytes:
    headers = [
        ("Host", f"{target.host}:{target.port}"),
        ("User-Agent", "neounify"),
        ("Accept", f"{medium}/*"),
        ("Connection", "close"),
    ]
    request = h11.Request(method="GET", target=target.path, headers=headers)
    return (connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b"")
