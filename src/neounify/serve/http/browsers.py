"""Middleware that guards browsers: host names that are answered, other sites, headers of answers.

A server without keys trusts all its callers. A web page of another site must not: neither by
pointing a name of its own at this machine (DNS rebinding; its Host header names that site), nor by
sending forms here (Sec-Fetch-Site says so), nor by framing the page.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neounify.errors import ConfigError
from neounify.serve.http.errors import ApiError

ANY = "*"
CLOSED_CSP = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy of answers that are no pages."""
HEADERS = {
    "Content-Security-Policy": CLOSED_CSP,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of answers that say nothing else."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of the page's files."""
_HOST = re.compile(r"(?:\[([^\[\]]*:[^\[\]]*)\]|([^:@\[\]/]+))(?::[0-9]*)?")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HEALTH = "/health"


def default_hosts(bind: str) -> tuple[str, ...]:
    """Names that a server bound to `bind` is reached by without a name service of others."""
    machine = socket.gethostname().lower()
    return tuple(dict.fromkeys(("localhost", machine, f"{machine}.local", bind.lower())))


def parse_origin(text: str) -> str:
    """An origin as browsers send it: "*" or scheme://host[:port]. Raises ConfigError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"origin {text!r} cannot be read ({error})") from error
    rest = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    if text != ANY and (parts.scheme not in ("http", "https") or not parts.hostname or rest):
        raise ConfigError(f"origin {text!r}: write http://HOST:PORT, https://HOST, or *")
    if text == ANY:
        return ANY
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


class BrowserGuard:
    """ASGI middleware. `hosts` are the names that are answered, empty: all.

    IP addresses are always answered, as no site can claim one for a name of its own. Headers that
    an answer has already are left as they are.
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
        if host and not path.startswith(_HEALTH) and not self._answers(host):
            raise ApiError(
                421,
                f"This server is not known as {host[:100]!r}. If it should be, start it with "
                "--allowed-host NAME.",
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

    def _answers(self, host: str) -> bool:
        if not self._hosts:
            return True
        name = _host_name(host)
        return name in self._hosts or name.endswith(".localhost") or _is_address(name)


def _host_name(host: str) -> str:
    """The name in a Host header, without port and final dot; empty for what is no such header."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).removesuffix(".").lower() if found else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
