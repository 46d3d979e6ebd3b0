"""ASGI middleware: limits, API keys, metrics, disconnects, and the guard of browsers.

A server without keys trusts all its callers. A web page of another site must not be among them:
neither by pointing a name of its own at this machine (DNS rebinding; its Host header names that
site), nor by sending forms (Sec-Fetch-Site says so), nor by framing the page.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neounify.runtime import MemoryReturner
from neounify.serve.client import within
from neounify.serve.http.config import ANY, HttpMetrics, Limits
from neounify.serve.http.errors import INTERNAL, ApiError, bad_request, overloaded
from neounify.serve.http.uploads import UploadBytes

API = "/v1/"
RESULTS = "/v1/results/"
CLIENT_GONE = 499
"""Status in metrics, never sent, of a request whose client disconnected."""
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
"""Methods that metrics name; clients may send any other word."""
EVERYBODY = "everybody"
"""The name of the only account of a server without keys."""
_log = logging.getLogger(__name__)

CLOSED_CSP = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy of answers other than pages."""
HEADERS = {
    "Content-Security-Policy": CLOSED_CSP,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Security headers of answers that do not set them."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "media-src data: blob:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of the page's files."""
_HOST = re.compile(r"(?:\[([^\[\]]*:[^\[\]]*)\]|([^:@\[\]/]+))(?::[0-9]*)?")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HEALTH = "/health"


class LimitMiddleware:
    """ASGI middleware: limits, API keys, metrics, and the end of requests at a disconnect.

    Keys, rates and `in_flight` concern the paths of the API only.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        accounts: Accounts,
        limits: Limits,
        metrics: HttpMetrics,
        uploads: UploadBytes,
    ) -> None:
        self._app, self._accounts, self._limits = app, accounts, limits
        self._metrics = metrics
        self._in_flight = 0
        self._uploads = uploads
        self._memory = MemoryReturner()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        method = scope["method"]
        answer = _Sender(send, without_body=method == "HEAD")
        scope = _routed(scope)
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._pass(scope, receive, answer)
            except Exception:
                if answer.status is not None:
                    raise
                _log.exception("a request failed")
                await INTERNAL.response()(scope, receive, answer.send)
            except BaseException:
                answer.status = answer.status or 500
                raise
            finally:
                seconds = time.perf_counter() - started
                self._count(method, scope, answer.status or CLIENT_GONE, seconds)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Sender) -> None:
        with ExitStack() as stack:
            try:
                self._admit(scope, stack)
            except ApiError as error:
                # The body was not read, so the connection cannot be used again.
                response = error.response({"Connection": "close"})
                await response(scope, receive, answer.send)
                return
            body = _Body(receive, self._limits, self._uploads)
            stack.callback(body.forget)
            with suppress(ClientDisconnect):
                await _until_gone(self._app, scope, body, answer.send)
            if body.cut_off:  # whatever the app answered to the part that had arrived
                answer.status = CLIENT_GONE
        if self._memory.is_due:
            await asyncio.to_thread(self._memory.run)

    def _admit(self, scope: Scope, stack: ExitStack) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        _check_head(scope, headers, self._limits)
        if not path.startswith(API) or path.startswith(RESULTS) or scope["method"] == "OPTIONS":
            return
        account = self._accounts.find(headers.get("authorization"))
        if self._in_flight >= self._limits.in_flight:
            raise overloaded(
                f"The server answers {self._in_flight} requests, its limit; try again soon.", 1.0
            )
        stack.enter_context(account.use())
        scope.setdefault("state", {})["account"] = account.name
        self._in_flight += 1
        stack.callback(self._leave)

    def _leave(self) -> None:
        self._in_flight -= 1

    def _count(self, method: str, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        known = method if method in METHODS else "other"
        self._metrics.requests.labels(known, route, str(status)).inc()
        self._metrics.total.labels(route).observe(seconds)


def _routed(scope: Scope) -> Scope:
    """The scope for routing: HEAD as GET, no slash at the end of the API's paths."""
    scope = dict(scope)
    if scope["method"] == "HEAD":
        scope["method"] = "GET"
    if scope["path"].startswith(API):
        scope["path"] = scope["path"].rstrip("/")
    return scope


def _check_head(scope: Scope, headers: Headers, limits: Limits) -> None:
    """Raises ApiError for a head that is too large or ambiguous about the body's length."""
    raw = scope["headers"]
    target = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    size = target + sum(len(name) + len(value) for name, value in raw)
    if len(raw) > limits.headers or size > limits.header_bytes:
        raise ApiError(
            431,
            f"The request's head has {len(raw)} headers and {size} bytes; at most "
            f"{limits.headers} and {limits.header_bytes} are read.",
            code="headers_too_large",
        )
    lengths = headers.getlist("content-length")
    if len(lengths) > 1 or "," in "".join(lengths):
        raise _ambiguous("two values of Content-Length")
    if lengths and "transfer-encoding" in headers:
        raise _ambiguous("both Content-Length and Transfer-Encoding")
    length = lengths[0] if lengths else ""
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)


class _Sender:
    """The ASGI `send` of one request; keeps the status that was sent."""

    def __init__(self, send: Send, *, without_body: bool) -> None:
        self._send, self._without_body = send, without_body
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self._without_body and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)


class _Body:
    """The ASGI `receive` of one request: its body within limits, then the disconnect."""

    def __init__(self, receive: Receive, limits: Limits, uploads: UploadBytes) -> None:
        self._receive, self._limits, self._uploads = receive, limits, uploads
        self.bytes = 0
        self.cut_off = False
        """Whether the client disconnected before the end of the body."""
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self._complete = asyncio.Event()
        self._gone = asyncio.Event()

    def forget(self) -> None:
        """Stop counting the body's bytes."""
        self._uploads.remove(self.bytes)
        self.bytes = 0

    async def receive(self) -> Message:
        if self._complete.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        left = self._deadline - asyncio.get_running_loop().time()
        patience = min(left, self._limits.body_idle_seconds)
        try:
            # Not 0: what has arrived by now is still taken.
            message = await within(self._receive(), max(patience, 0.001))
        except TimeoutError:
            raise ApiError(
                408,
                f"The request's body took more than {self._limits.body_seconds:g} seconds, or "
                f"paused for more than {self._limits.body_idle_seconds:g}.",
                code="body_timeout",
            ) from None
        size = len(message.get("body", b""))
        if self.bytes + size > self._limits.body_bytes:
            raise _too_large(self._limits)
        self._uploads.add(size)
        self.bytes += size
        if message["type"] == "http.disconnect":
            self.cut_off = True
            self._gone.set()
        if not message.get("more_body", False):
            self._complete.set()
        return message

    async def until_gone(self) -> None:
        """Return when the client has disconnected after sending the whole body."""
        await self._complete.wait()
        while not self._gone.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._gone.set()


async def _until_gone(app: ASGIApp, scope: Scope, body: _Body, send: Send) -> None:
    """Run the app, and cancel it when the client disconnects."""
    work = asyncio.ensure_future(app(scope, body.receive, send))
    watch = asyncio.ensure_future(body.until_gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        work.cancel()  # without effect on finished work
        await asyncio.gather(work, watch, return_exceptions=True)
    if not work.cancelled():
        work.result()


def _ambiguous(what: str) -> ApiError:
    return bad_request(f"The request has {what}; send one.", code="ambiguous_length")


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"The request is larger than {limits.body_bytes} bytes; send fewer or smaller images.",
        code="request_too_large",
    )


class BrowserMiddleware:
    """ASGI middleware: Host names, cross-site requests, security headers of answers.

    `hosts` are the accepted names, empty: all. IP addresses are always accepted, as no site can
    claim one for a name of its own. Headers that an answer has already are kept.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._app, self._origins = app, origins
        self._hosts = () if ANY in hosts else tuple(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            # The body was not read, so the connection cannot be used again.
            await error.response({"Connection": "close"})(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if host and not path.startswith(_HEALTH) and not self._is_allowed(host):
            raise ApiError(
                421,
                f"This server does not answer to the host {host[:100]!r}. If it should, start it "
                "with --allowed-host NAME.",
                code="unknown_host",
            )
        if scope["method"] in _SAFE_METHODS or headers.get("sec-fetch-site") != "cross-site":
            return
        origin = headers.get("origin", "null")
        if "authorization" not in headers and not {origin, ANY} & set(self._origins):
            raise ApiError(
                403,
                f"Pages of {origin[:100]!r} may not use this server. If they should, start it "
                "with --cors-origin ORIGIN.",
                code="origin_not_allowed",
            )

    def _is_allowed(self, host: str) -> bool:
        if not self._hosts:
            return True
        name = _host_name(host)
        return name in self._hosts or name.endswith(".localhost") or _is_address(name)


def _host_name(host: str) -> str:
    """The name in a Host header, without port and final dot; empty for an invalid header."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2]).removesuffix(".").lower() if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# --- accounts ---


class TokenBucket:
    """Token bucket: `per_minute` requests a minute on average, as many in one burst."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._rate = per_minute / 60
        self._tokens, self._updated = float(per_minute), clock()

    def take(self) -> float:
        """Take one request: 0 when it is allowed, else the seconds until the next one is."""
        now = self._clock()
        self._tokens = min(self.per_minute, self._tokens + (now - self._updated) * self._rate)
        self._updated = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


class Account:
    """Requests of one API key: their rate, and how many are in flight."""

    def __init__(self, name: str, bucket: TokenBucket | None, concurrent: int | None) -> None:
        self.name = name
        self._bucket, self._concurrent = bucket, concurrent
        self._running = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Context of one request, from its start to its end. Raises ApiError 429 over a limit."""
        if self._concurrent is not None and self._running >= self._concurrent:
            raise _over_limit(
                f"This key may run {self._concurrent} requests at a time; wait for one to end.",
                "concurrency_limit_exceeded",
                1.0,
            )
        if self._bucket is not None and (wait := self._bucket.take()) > 0:
            raise _over_limit(
                f"This key may send {self._bucket.per_minute} requests a minute; try again in "
                f"{wait:.1f} seconds.",
                "rate_limit_exceeded",
                wait,
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class Accounts:
    """Accounts by API key; keys are compared by their digests in constant time."""

    def __init__(
        self,
        keys: Mapping[str, str],
        *,
        requests_per_minute: int | None = None,
        concurrent: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digests = {name: _digest(key) for name, key in keys.items()}

        def account(name: str) -> Account:
            bucket = TokenBucket(requests_per_minute, clock) if requests_per_minute else None
            return Account(name, bucket, concurrent)

        self._accounts = {name: account(name) for name in keys or (EVERYBODY,)}

    def find(self, authorization: str | None) -> Account:
        """The account of an Authorization header. Raises ApiError 401 for no or a wrong key."""
        if not self._digests:
            return self._accounts[EVERYBODY]
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorised(
                "No API key was given; send it as 'Authorization: Bearer KEY'.", "missing_api_key"
            )
        digest = _digest(key.strip())
        # All are compared, so that the time reveals nothing about any of them.
        names = [n for n, known in self._digests.items() if hmac.compare_digest(known, digest)]
        if not names:
            raise _unauthorised("The API key is not known here.", "invalid_api_key")
        return self._accounts[names[0]]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorised(message: str, code: str) -> ApiError:
    return ApiError(401, message, kind="authentication_error", code=code)


def _over_limit(message: str, code: str, wait: float) -> ApiError:
    return ApiError(429, message, kind="rate_limit_error", code=code, retry_after=wait)
