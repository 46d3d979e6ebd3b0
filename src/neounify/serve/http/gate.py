"""What every request passes on its way in: limits, keys, counting, and a watch on its caller."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neounify.serve.http.accounts import Accounts
from neounify.serve.http.errors import ApiError
from neounify.serve.http.metrics import HttpMetrics
from neounify.serve.http.settings import Limits
from neounify.serve.waiting import within

API = "/v1/"
RESULTS = "/v1/results/"
CLIENT_GONE = 499
"""The status that is counted, and never sent, when the caller hung up."""


class Gate:
    """ASGI middleware. Keys, rates and `in_flight` concern the paths of the API only."""

    def __init__(
        self, app: ASGIApp, *, accounts: Accounts, limits: Limits, metrics: HttpMetrics
    ) -> None:
        self._app, self._accounts, self._limits = app, accounts, limits
        self._metrics = metrics
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        answer = _Answer(send)
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._pass(scope, receive, answer)
            except BaseException:
                answer.status = answer.status or 500
                raise
            finally:
                self._count(scope, answer.status or CLIENT_GONE, time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        with ExitStack() as stack:
            try:
                self._admit(scope, stack)
            except ApiError as error:
                # The body was not read, so the connection cannot be used again.
                response = error.response({"Connection": "close"})
                await response(scope, receive, answer.send)
                return
            body = _Body(receive, self._limits)
            await _until_gone(self._app, scope, body, answer.send)

    def _admit(self, scope: Scope, stack: ExitStack) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._limits.body_bytes:
            raise _too_large(self._limits)
        if not path.startswith(API) or path.startswith(RESULTS):
            return
        account = self._accounts.find(headers.get("authorization"))
        if self._in_flight >= self._limits.in_flight:
            raise ApiError(
                429,
                "The server is at its limit of requests; try again soon.",
                kind="rate_limit_error",
                code="overloaded",
                retry_after=1.0,
            )
        stack.enter_context(account.use())
        self._in_flight += 1
        stack.callback(self._leave)

    def _leave(self) -> None:
        self._in_flight -= 1

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.requests.labels(scope["method"], route, str(status)).inc()
        self._metrics.total.labels(route).observe(seconds)


class _Answer:
    """The way out; remembers the status that was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


class _Body:
    """The way in: the body within its limits of bytes and time, then word of the caller's end."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._bytes = 0
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self._complete = asyncio.Event()
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        if self._complete.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await within(self._receive(), max(left, 0.001))
        except TimeoutError:
            raise ApiError(
                408, "The request's body took too long to arrive.", code="body_timeout"
            ) from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limits.body_bytes:
            raise _too_large(self._limits)
        if message["type"] == "http.disconnect":
            self._gone.set()
        if not message.get("more_body", False):
            self._complete.set()
        return message

    async def until_gone(self) -> None:
        """Return when the caller has hung up after sending the whole body."""
        await self._complete.wait()
        while not self._gone.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._gone.set()


async def _until_gone(app: ASGIApp, scope: Scope, body: _Body, send: Send) -> None:
    """Run the app, and cancel it as soon as nobody waits for its answer any more."""
    work = asyncio.ensure_future(app(scope, body.receive, send))
    watch = asyncio.ensure_future(body.until_gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        work.cancel()  # nothing happens when it is done
        await asyncio.gather(work, watch, return_exceptions=True)
    if not work.cancelled():
        work.result()


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"The request is larger than {limits.body_bytes} bytes; send fewer or smaller images.",
        code="request_too_large",
    )
