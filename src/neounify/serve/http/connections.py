"""Connections and JSON bodies within their limits.

uvicorn bounds neither the number of connections nor the time that a head or an unread answer may
take: a client that opens connections and sends nothing, or asks and never reads, would hold its
socket and the answer until the server ends. FastAPI would keep every form of a body (bytes, text,
objects) until the answer is complete, parse any number of values on the event loop, and list an
error for each of them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from neounify.runtime import return_freed_memory
from neounify.serve.http.config import HttpConfig, Limits
from neounify.serve.http.errors import ApiError, bad_request
from neounify.serve.http.middleware import HEADERS

MAX_CHUNKS, MIN_CHUNK_BYTES = 5000, 256
"""Maximum chunks of one body, and minimum bytes per further chunk on average: each chunk takes as
much time as kilobytes of a larger one."""
PIECE_BYTES = 256 * 1024
"""Bytes of a piece of a file that is sent."""
_LENGTH = re.compile(rb"^content-length[ \t]*:([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_TICK_SECONDS = 1.0
_RETRY_SECONDS = 2.0


_BOM = b"\xef\xbb\xbf"
_STRUCTURE = (b",", b":", b"[", b"{")
_LARGE_BYTES = 8 * 2**20
"""Bodies above this return their memory to the system at once."""
_LONG_STRING = 2**20
"""Bytes of a string above which it must be ASCII without escapes."""
_MAX_BACKSLASHES = 1000
"""Maximum backslashes that are counted before a quote, so that many of them cost little."""
_INLINE_BYTES = 64 * 1024
"""Bodies up to this are parsed on the event loop, which takes less than a change of threads."""


def server_config(app: ASGIApp, config: HttpConfig, **options: Any) -> uvicorn.Config:
    """uvicorn's config of an app with limits; `options` are uvicorn's, such as host and port."""
    protocol: Any = partial(BoundedProtocol, http=config)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        server_header=False,
        timeout_keep_alive=max(1, round(config.connections.idle)),
        **options,
    )


class _Parser(h11.Connection):
    """h11's parser, strict about repeated lengths and bodies in countless chunks."""

    _chunks, _bytes = 0, 0

    def next_event(self) -> Any:
        """Raises RemoteProtocolError as h11 does."""
        if self.their_state is h11.IDLE:
            head = self.trailing_data[0].partition(b"\r\n\r\n")[0]
            lengths = b",".join(_LENGTH.findall(head))
            if b"," in lengths:  # h11 accepts repeated equal ones
                raise h11.RemoteProtocolError("more than one Content-Length")
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks, self._bytes = 0, 0
        elif isinstance(event, h11.Data):
            self._chunks += 1
            self._bytes += len(event.data)
            if self._chunks > MAX_CHUNKS + self._bytes // MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("too many small chunks")
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol within ConnectionLimits."""

    def __init__(self, *, http: HttpConfig, **options: Any) -> None:
        super().__init__(**options)
        self._limits = http.connections
        self.conn = _Parser(h11.SERVER, http.limits.header_bytes)
        self._watch: asyncio.TimerHandle | None = None
        self._awaits_head_since: float | None = None
        self._unread_since: float | None = None
        self._unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuses a connection over the limit with 503."""
        super().connection_made(transport)
        self._awaits_head_since = self.loop.time()
        if len(self.connections) > self._limits.count:
            self._refuse(
                ApiError(
                    503,
                    f"The server has {self._limits.count} connections open, its limit.",
                    kind="server_error",
                    code="too_many_connections",
                    retry_after=_RETRY_SECONDS,
                )
            )
        self._tick()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the timer as well."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Starts the time of a request's head with its first byte on an idle connection."""
        if self.transport.is_closing():
            return
        if self._is_idle() and self._awaits_head_since is None:
            self._awaits_head_since = self.loop.time()
        super().data_received(data)
        if not self._is_idle():
            self._awaits_head_since = None

    def on_response_complete(self) -> None:
        """Starts the time of the next head, of which a part may have arrived."""
        self._awaits_head_since = None
        super().on_response_complete()
        # uvicorn starts its idle timer although the next head has begun, and would close on it.
        if not self.transport.is_closing() and self._is_idle() and self.conn.trailing_data[0]:
            self._unset_keepalive_if_required()
            self._awaits_head_since = self.loop.time()

    def resume_writing(self) -> None:
        """The client has read."""
        self._unread_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answers in the form of all other errors."""
        self._refuse(bad_request("The request is not valid HTTP/1.1.", code="invalid_http"))

    def _is_idle(self) -> bool:
        """Whether neither a request is read nor one answered."""
        return self.conn.their_state is h11.IDLE

    def _tick(self) -> None:
        now = self.loop.time()
        if self._is_unread(now):
            self.transport.abort()
            return
        if _over(self._awaits_head_since, self._limits.head, now):
            self._awaits_head_since = None
            if self.conn.trailing_data[0]:
                message = f"The request's head took more than {self._limits.head:g} seconds."
                self._refuse(ApiError(408, message, code="head_timeout"))
            else:
                self.transport.close()
        self._watch = self.loop.call_later(_TICK_SECONDS, self._tick)

    def _is_unread(self, now: float) -> bool:
        """Whether the client has read nothing of a waiting answer for too long."""
        unread = self.transport.get_write_buffer_size()
        if not (self.flow.write_paused or self.transport.is_closing()):
            self._unread_since = None
        elif self._unread_since is None or unread < self._unread_bytes:
            self._unread_since = now
        self._unread_bytes = unread
        return _over(self._unread_since, self._limits.write, now)

    def _refuse(self, error: ApiError) -> None:
        """Answer instead of the app, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        response = error.response({**HEADERS, "Connection": "close"})
        head = h11.Response(status_code=response.status_code, headers=response.raw_headers)
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def _over(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since > seconds


class PiecesResponse(Response):
    """Response that sends its body in pieces, each when the client has read those before.

    So a client that reads slowly costs no second copy of a large file.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        for first in range(0, len(self.body), PIECE_BYTES):
            piece = self.body[first : first + PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def add_warnings(response: Response, warnings: Sequence[str]) -> None:
    """Put warnings about an answer into its head, where there are any."""
    if warnings:
        response.headers["Neounify-Warning"] = "; ".join(warnings)


class BoundedRequest(Request):
    """A request whose JSON is counted before it is parsed, and whose bytes are not kept."""

    async def json(self) -> Any:
        """The body's value. Raises ApiError 400 for what is not JSON or exceeds the limits."""
        if not hasattr(self, "_json"):
            chunks = [chunk async for chunk in self.stream()]
            limits = self.app.state.server.config.limits
            if sum(map(len, chunks)) <= _INLINE_BYTES:
                self._json = parse_body(chunks, limits)
            else:
                self._json = await asyncio.to_thread(parse_body, chunks, limits)
        return self._json


class _JsonRequest(BoundedRequest):
    """BoundedRequest for routes with a body parameter."""

    async def body(self) -> bytes:
        """A placeholder: FastAPI only asks whether there is a body, and would keep it."""
        return b"JSON"


class BoundedRoute(APIRoute):
    """Route whose JSON body is read by BoundedRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        takes_json = self.body_field is not None

        async def bounded(request: Request) -> Response:
            if not takes_json:
                return await handle(BoundedRequest(request.scope, request.receive))
            check_json_type(request.headers.get("content-type"))
            headers = [h for h in request.scope["headers"] if h[0] != b"content-type"]
            headers.append((b"content-type", b"application/json"))
            request.scope["headers"] = headers
            return await handle(_JsonRequest(request.scope, request.receive))

        return bounded


def check_json_type(
    content_type: str | None, advice: str = "send Content-Type: application/json"
) -> None:
    """Raises ApiError 415 for a content type other than JSON; none counts as JSON."""
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise ApiError(
            415,
            f"The body is sent as {kind[:80]!r}; {advice}.",
            code="unsupported_media_type",
        )


def parse_body(chunks: list[bytes], limits: Limits) -> Any:
    """The value of a JSON text in UTF-8. Raises ApiError 400.

    `chunks` is emptied and its memory freed: only the value is kept.
    """
    # Joined once: a buffer that grows piece by piece is copied each time, and leaves gaps.
    data = b"".join(chunks)
    chunks.clear()
    try:
        return _parsed(data, limits)
    except ApiError as error:
        raise error.with_traceback(None) from None  # the traceback's frames hold the data
    finally:
        if len(data) > _LARGE_BYTES:
            del data
            return_freed_memory()


def _parsed(data: bytes, limits: Limits) -> Any:
    data = data.removeprefix(_BOM)
    if not data or data.isspace():
        raise bad_request("The body is empty; send a JSON object.")
    # Characters inside strings count too, but text is limited to `prompt_chars` of them.
    if sum(map(data.count, _STRUCTURE)) > limits.prompt_chars + 3 * limits.json_values:
        raise _too_many(limits)
    if len(data) > _LARGE_BYTES:
        _check_long_strings(data, limits)
    try:
        value = from_json(data, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise _not_json(str(error), limits) from None
    _check_structure(value, limits)
    return value


def _check_long_strings(data: bytes, limits: Limits) -> None:
    """Raises ApiError 400 for long strings that are not ASCII.

    One such character makes every character of a string take four bytes.
    """
    if data.count(b'"') > limits.prompt_chars + 4 * limits.json_values:
        raise _too_many(limits)
    start = data.find(b'"')
    while start >= 0:
        stop = data.find(b'"', start + 1)
        while stop >= 0 and _is_escaped(data, stop):
            stop = data.find(b'"', stop + 1)
        if stop < 0:
            return  # not JSON; the parser raises the error
        if stop - start > _LONG_STRING and (
            data.find(b"\\", start, stop) >= 0 or not data[start:stop].isascii()
        ):
            raise bad_request(
                f"A string of {stop - start} bytes is too long; only data URLs may be, without "
                "escaped characters.",
                code="request_too_complex",
            )
        start = data.find(b'"', stop + 1)


def _is_escaped(data: bytes, index: int) -> bool:
    before = data[max(0, index - _MAX_BACKSLASHES) : index]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1


def _check_structure(value: Any, limits: Limits) -> None:
    count, level = 1, [value]
    for _ in range(limits.json_depth):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        count += len(inner)
        if count > limits.json_values:
            raise _too_many(limits)
        if not inner:
            return
        level = inner
    raise _too_deep(limits)


def _not_json(reason: str, limits: Limits) -> ApiError:
    if reason.startswith("recursion limit"):
        return _too_deep(limits)
    if reason.startswith("invalid unicode code point"):
        return bad_request(f"The body is not UTF-8 text ({reason[:200]}).")
    hint = ""
    if "hex escape" in reason or "surrogate" in reason:
        hint = "; half of a surrogate pair, such as \\ud83d alone, is not a character"
    return bad_request(f"The body is not JSON ({reason[:200]}{hint}).")


def _too_many(limits: Limits) -> ApiError:
    return bad_request(
        f"The body holds more than {limits.json_values} values or more than "
        f"{limits.prompt_chars} characters of text; send fewer.",
        code="request_too_complex",
    )


def _too_deep(limits: Limits) -> ApiError:
    return bad_request(
        f"The body nests objects or lists more than {limits.json_depth} deep.",
        code="request_too_complex",
    )
