"""HTTP as a client sees it: one exchange per connection, over loopback.

A connection for each exchange, so that hanging up is nothing but closing it, and so that the
load costs the machine, which the server shares, as little as possible.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11

HOST = "127.0.0.1"
_CHUNK = 64 * 1024


@dataclass(frozen=True, eq=False)
class Exchange:
    """An answer whose head has come. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    _connection: h11.Connection
    _reader: asyncio.StreamReader

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises h11.RemoteProtocolError when it breaks off."""
        while True:
            event = await _next_event(self._connection, self._reader)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The JSON of server-sent events, without the [DONE] at their end."""
        buffer = b""
        async for chunk in self.chunks():
            *complete, buffer = (buffer + chunk).split(b"\n\n")
            for event in complete:
                data = event.rpartition(b"data: ")[2]
                if data != b"[DONE]":
                    yield json.loads(data)


@asynccontextmanager
async def exchange(
    port: int, path: str, body: Mapping[str, Any] | None = None
) -> AsyncGenerator[Exchange]:
    """POST a body as JSON, or GET without one; leaving hangs up.

    Raises OSError and h11.RemoteProtocolError when there is no answer.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        connection = h11.Connection(h11.CLIENT)
        writer.write(_request(connection, path, body))
        await writer.drain()
        event = await _next_event(connection, reader)
        while isinstance(event, h11.InformationalResponse):
            event = await _next_event(connection, reader)
        if not isinstance(event, h11.Response):
            raise h11.RemoteProtocolError("the connection ended before an answer began")
        headers = {name.decode(): value.decode() for name, value in event.headers}
        yield Exchange(event.status_code, headers, connection, reader)
    finally:
        writer.close()


async def get_text(port: int, path: str) -> tuple[int, str]:
    """(status, body) of a GET."""
    async with exchange(port, path) as answer:
        return answer.status, (await answer.read()).decode()


def _request(connection: h11.Connection, path: str, body: Mapping[str, Any] | None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    headers = [
        ("Host", HOST),
        ("Connection", "close"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(data))),
    ]
    head = h11.Request(method="GET" if body is None else "POST", target=path, headers=headers)
    parts = [connection.send(head), connection.send(h11.Data(data=data))]
    parts.append(connection.send(h11.EndOfMessage()))
    return b"".join(part or b"" for part in parts)


async def _next_event(connection: h11.Connection, reader: asyncio.StreamReader) -> Any:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(_CHUNK))
    return event
