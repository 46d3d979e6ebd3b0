"""Server-sent events: an answer that arrives in pieces, and its errors on the way."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from neounify.serve.http.errors import INTERNAL, to_api_error
from neounify.serve.http.pump import Pump
from neounify.serve.waiting import within

DONE = b"data: [DONE]\n\n"
ALIVE = b": working\n\n"
"""A comment, which clients pass over; proxies close connections that stay silent."""
SILENCE_SECONDS = 15.0
_log = logging.getLogger(__name__)


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event as it goes over the wire."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class EventStream(Response):
    """Sends what `chunks` gives, and closes it when it ends, fails or nobody listens."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes | None, chunks: Pump[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._chunks = first, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._chunks):
            await send(start)
            chunk = self._first
            while chunk is not None:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # Sending to somebody who has left does not wait, and the watch needs its turn.
                await asyncio.sleep(0)
                chunk = await self._next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes | None:
        try:
            return await _next_within(self._chunks)
        except Exception as error:
            api_error = to_api_error(error)
            if api_error is INTERNAL:
                _log.exception("an answer broke off while it was streamed")
            return sse(api_error.body(), "error")


async def start_stream(source: AsyncGenerator[bytes]) -> EventStream:
    """Wait a while for the first chunk, so that what fails before it gets a status of its own."""
    chunks = Pump([source])
    try:
        first = await _next_within(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks)


async def _next_within(chunks: Pump[bytes]) -> bytes | None:
    """The next chunk, or a comment after a time of silence; None at the end."""
    try:
        found = await within(chunks.next(), SILENCE_SECONDS)
    except TimeoutError:
        return ALIVE
    return None if found is None else found[1]
