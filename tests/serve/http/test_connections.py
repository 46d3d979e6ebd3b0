"""Connections that say nothing, too little, too much, or never read."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from uvicorn.server import ServerState

from neounify.serve.http import HttpConfig, Limits, create_app
from neounify.serve.http.config import ConnectionLimits
from neounify.serve.http.connections import PIECE_BYTES, BoundedProtocol, server_config
from neounify.serve.service import ServiceRequest
from neounify.tasks.program import Finished, TaskEvent, TextPiece
from serve.http.test_middleware import connected
from support.http_server import running, wait_until
from support.scripted_service import Scripted

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


def everything(caller: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    caller.settimeout(30)
    pieces = []
    while piece := caller.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.fixture(scope="module")
def impatient() -> Iterator[str]:
    config = HttpConfig(
        limits=Limits(header_bytes=4096),
        connections=ConnectionLimits(count=4, head=1.0, idle=1.0, write=1.0),
    )
    with running(create_app(Scripted(), config)) as url:
        yield url


def test_a_connection_without_a_request_is_closed(impatient: str) -> None:
    with connected(impatient) as caller:
        assert everything(caller) == b""


def test_a_head_that_does_not_end_is_given_up(impatient: str) -> None:
    with connected(impatient) as caller:
        caller.sendall(HEAD)
        answer = everything(caller)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"head_timeout" in answer


def test_a_head_that_drips_is_given_up(impatient: str) -> None:
    with connected(impatient) as caller:
        caller.settimeout(0.2)
        answer, end = b"", time.monotonic() + 30
        while not answer and time.monotonic() < end:
            caller.sendall(b"X: y\r\n" if answer else b"A")
            try:
                answer = caller.recv(4096)
            except TimeoutError:
                continue
        assert answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))


def test_a_second_head_on_the_same_connection_is_timed_too(impatient: str) -> None:
    with connected(impatient) as caller:
        caller.sendall(GET + b"GET /v1/models HTTP/1.1\r\n")
        answer = everything(caller)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in answer


def test_an_idle_connection_is_closed_after_its_answer(impatient: str) -> None:
    with connected(impatient) as caller:
        caller.sendall(GET)
        assert everything(caller).count(b"HTTP/1.1 200 ") == 1


def test_pipelined_requests_are_answered_in_turn(impatient: str) -> None:
    with connected(impatient) as caller:
        caller.sendall(GET * 5)
        assert everything(caller).count(b"HTTP/1.1 200 ") == 5


def test_connections_over_the_limit_get_503(impatient: str) -> None:
    callers = [connected(impatient) for _ in range(4)]
    try:
        with connected(impatient) as one_more:
            answer = everything(one_more)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 2" in answer.lower()
            assert b"too_many_connections" in answer
    finally:
        for caller in callers:
            caller.close()

    def answers() -> bool:
        with connected(impatient) as caller:
            caller.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            return everything(caller).startswith(b"HTTP/1.1 200 ")

    wait_until(answers)


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (CHUNKED + b"Content-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400, b"ambiguous"),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, b"invalid_http"),
        (HEAD + b"Content-Length: 2, 2\r\n\r\n{}", 400, b"invalid_http"),
        (HEAD + b"Content-Length: 2\r\ncontent-length: 2\r\n\r\n{}", 400, b"invalid_http"),
        (HEAD + b"Content-Length: +2\r\n\r\n{}", 400, b"invalid_http"),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, b"invalid_http"),
        (HEAD + b"Content-Length : 2\r\n\r\n{}", 400, b"invalid_http"),
        (HEAD + b"Host: other\r\n\r\n", 400, b"invalid_http"),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 400, b"invalid_http"),
        (HEAD + b"X: " + b"y" * 5000 + b"\r\n\r\n", 431, b"headers_too_large"),
        (HEAD + b"X: " + b"y" * 100_000, 400, b"invalid_http"),
        (HEAD + b"X: y\r\n" * 150 + b"\r\n", 431, b"headers_too_large"),
        (CHUNKED + b"\r\n" + b"1\r\n \r\n" * 20_000, 400, b"invalid_http"),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, b"headers_too_large"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, b"invalid_http"),
    ],
)  # fmt: skip
def test_heads_that_are_refused(
    impatient: str, request_bytes: bytes, status: int, code: bytes
) -> None:
    with connected(impatient) as caller:
        caller.sendall(request_bytes)
        answer = everything(caller)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert code in answer
    assert b"connection: close" in answer.lower()


def test_a_client_that_never_reads_is_given_up() -> None:
    def chatty(_: ServiceRequest, __: int) -> Iterator[TaskEvent]:
        while True:
            yield TextPiece("x" * 100_000)

    service = Scripted(chatty)
    config = HttpConfig(connections=ConnectionLimits(write=1.0))
    with running(create_app(service, config)) as url, connected(url) as caller:
        body = b'{"stream": true, "messages": [{"role": "user", "content": "x"}]}'
        caller.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: service.open == 1)
        wait_until(lambda: service.open == 0)


def test_a_client_that_reads_slowly_gets_the_whole_answer() -> None:
    count, size, seconds = 0, 24 * 2**20, 9

    def answer(_: ServiceRequest, __: int) -> list[TaskEvent]:
        return [TextPiece("x" * size), Finished("stop", 1, 1)]

    config = HttpConfig(connections=ConnectionLimits(write=5.0))
    with running(create_app(Scripted(answer), config)) as url, connected(url) as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        body = b'{"messages": [{"role": "user", "content": "x"}]}'
        head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        caller.sendall(head + body)
        caller.settimeout(30)
        started = time.monotonic()
        while count < size:
            piece = caller.recv(2**20)
            assert piece, f"the connection ended after {count} bytes"
            count += len(piece)
            time.sleep(max(0.0, started + seconds * count / size - time.monotonic()))


class _Clock:
    """A loop whose time the test sets."""

    def __init__(self) -> None:
        self.now, self.tick = 0.0, lambda: None

    def time(self) -> float:
        return self.now

    def call_later(self, _: float, tick: Any) -> None:
        self.tick = tick


class _Transport:
    """A transport with bytes that were not read."""

    unread, closing, aborted = 0, False, False

    def get_extra_info(self, _: str) -> None:
        """Nothing is known."""

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("closing", [False, True])
def test_only_a_client_that_reads_nothing_is_given_up(closing: bool) -> None:
    clock, transport = _Clock(), _Transport()
    config = HttpConfig(connections=ConnectionLimits(write=30.0, head=1e6))
    options: Any = {"server_state": ServerState(), "app_state": {}, "_loop": clock}
    protocol: Any = BoundedProtocol(
        http=config, config=server_config(create_app(Scripted(), config), config), **options
    )
    protocol.connection_made(transport)

    def passes(seconds: int) -> bool:
        """Whether the connection lasts."""
        for _ in range(seconds):
            clock.now += 1
            clock.tick()
            if transport.aborted:
                return False
        return True

    assert passes(100)
    transport.unread, transport.closing = 40 * 2**20, closing
    if not closing:
        protocol.pause_writing()
    for _ in range(20):
        transport.unread -= 2**20
        assert passes(25)
    if not closing:
        protocol.resume_writing()
        assert passes(100)
        protocol.pause_writing()
        assert passes(25)
    assert not passes(10)


def test_files_are_sent_in_pieces() -> None:
    app = create_app(Scripted())
    pieces: list[int] = []

    async def measured(scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            pieces.append(len(message.get("body", b"")))
            await send(message)

        await app(scope, receive, counted)

    file = bytes(range(256)) * 3000
    name = app.state.server.results.put(file, "image/png", "png")
    answer = TestClient(measured).get(f"/v1/results/{name}")
    assert answer.content == file
    assert answer.headers["content-length"] == str(len(file))
    assert (max(pieces), sum(pieces)) == (PIECE_BYTES, len(file))
    pieces.clear()
    head = TestClient(measured).head(f"/v1/results/{name}")
    assert (head.headers["content-length"], sum(pieces)) == (str(len(file)), 0)
