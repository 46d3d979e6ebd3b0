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

DONE = b"data: [DONE]\n\n"
_log = logging.getLogger(__name__)


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event as it goes over the wire."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class EventStream(Response):
    """Sends what `chunks` yields, and closes it when it ends, fails or nobody listens."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, chunks: AsyncGenerator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._chunks = first, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._chunks):
            await send(start)
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for chunk in _with_errors(self._chunks):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # Sending to somebody who has left does not wait, and the watch needs its turn.
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def start_stream(chunks: AsyncGenerator[bytes]) -> EventStream:
    """Wait for the first chunk, so that what fails before it still gets a status of its own."""
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks)


async def _with_errors(chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as error:
        api_error = to_api_error(error)
        if api_error is INTERNAL:
            _log.exception("an answer broke off while it was streamed")
        yield sse(api_error.body(), "error")
