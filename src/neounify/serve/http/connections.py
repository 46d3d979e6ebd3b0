"""Connections within their limits: how many, how long a head may take, who must read an answer.

uvicorn bounds none of these: a client that opens connections and sends nothing, or asks and never
reads, would hold its socket and the answer until the server ends.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from neounify.serve.http.browsers import HEADERS
from neounify.serve.http.errors import ApiError, bad_request
from neounify.serve.http.settings import HttpSettings

MAX_CHUNKS, MIN_CHUNK_BYTES = 5000, 256
"""Chunks of one body at most, and bytes that further ones hold on average at least: each costs as
much time as kilobytes of a larger one."""
_LENGTH = re.compile(rb"^content-length[ \t]*:([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_TICK_SECONDS = 1.0
_RETRY_SECONDS = 2.0


def server_config(app: ASGIApp, settings: HttpSettings, **options: Any) -> uvicorn.Config:
    """uvicorn's settings for an app; `options` are its own, such as host and port."""
    protocol: Any = partial(BoundedProtocol, settings=settings)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        server_header=False,
        timeout_keep_alive=max(1, round(settings.connections.idle)),
        **options,
    )


class _Parser(h11.Connection):
    """h11's parser, but strict about repeated lengths and bodies in countless chunks."""

    _chunks, _bytes = 0, 0

    def next_event(self) -> Any:
        """Raises RemoteProtocolError as h11 does."""
        if self.their_state is h11.IDLE:
            head = self.trailing_data[0].partition(b"\r\n\r\n")[0]
            lengths = b",".join(_LENGTH.findall(head))
            if b"," in lengths:  # h11 takes them for one where they are equal
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
    """uvicorn's HTTP/1.1 protocol; see ConnectionLimits for what is bounded."""

    def __init__(self, *, settings: HttpSettings, **options: Any) -> None:
        super().__init__(**options)
        self._limits = settings.connections
        self.conn = _Parser(h11.SERVER, settings.limits.header_bytes)
        self._watch: asyncio.TimerHandle | None = None
        self._awaits_head_since: float | None = None
        self._unread_since: float | None = None
        self._closing_since: float | None = None

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
        """Ends the watch as well."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Times the head of a request, from its first byte on a connection that was idle."""
        if self.transport.is_closing():
            return
        if self._is_idle() and self._awaits_head_since is None:
            self._awaits_head_since = self.loop.time()
        super().data_received(data)
        if not self._is_idle():
            self._awaits_head_since = None

    def on_response_complete(self) -> None:
        """The next head, of which a part may have arrived, is timed anew."""
        self._awaits_head_since = None
        super().on_response_complete()
        # uvicorn starts its idle timer although the next head has begun, and would close on it.
        if not self.transport.is_closing() and self._is_idle() and self.conn.trailing_data[0]:
            self._unset_keepalive_if_required()
            self._awaits_head_since = self.loop.time()

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes."""
        self._unread_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        self._unread_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """In the shape of all other errors."""
        self._refuse(bad_request("The request is not valid HTTP/1.1.", code="invalid_http"))

    def _is_idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.conn.their_state is h11.IDLE

    def _tick(self) -> None:
        now = self.loop.time()
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
        if _over(self._closing_since, self._limits.write, now) or _over(
            self._unread_since, self._limits.write, now
        ):
            self.transport.abort()
            return
        if _over(self._awaits_head_since, self._limits.head, now):
            self._awaits_head_since = None
            if self.conn.trailing_data[0]:
                self._refuse(
                    ApiError(408, "The request's head took too long.", code="head_timeout")
                )
            else:
                self.transport.close()
        self._watch = self.loop.call_later(_TICK_SECONDS, self._tick)

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
