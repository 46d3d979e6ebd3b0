"""JSON bodies within their limits: counted before they become objects, and read once.

FastAPI would keep every form of a body (bytes, text, objects) until the answer is complete and
would parse any number of values on the event loop; its pydantic errors would list each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from neounify.runtime import return_freed_memory
from neounify.serve.http.errors import ApiError, bad_request
from neounify.serve.http.settings import Limits

_BOM = b"\xef\xbb\xbf"
_STRUCTURE = (b",", b":", b"[", b"{")
_LARGE_BYTES = 8 * 2**20
"""Bodies above this leave their memory to the system at once."""
_LONG_STRING = 2**20
"""Bytes of a string above which it must be ASCII without escapes."""
_MAX_BACKSLASHES = 1000
"""How far back from a quote backslashes are counted, so that many of them cost little."""
_INLINE_BYTES = 64 * 1024
"""Bodies up to this are parsed on the event loop, which takes less than a change of threads."""


class BoundedRequest(Request):
    """A request whose JSON is counted before it is parsed, and whose bytes are not kept."""

    async def json(self) -> Any:
        """The body's value. Raises ApiError 400 for what is not JSON or exceeds the limits."""
        if not hasattr(self, "_json"):
            chunks = [chunk async for chunk in self.stream()]
            limits = self.app.state.context.settings.limits
            if sum(map(len, chunks)) <= _INLINE_BYTES:
                self._json = parse_json(chunks, limits)
            else:
                self._json = await asyncio.to_thread(parse_json, chunks, limits)
        return self._json


class _JsonRequest(BoundedRequest):
    """For routes with a body parameter."""

    async def body(self) -> bytes:
        """Not the body: FastAPI only asks whether there is one, and would keep it."""
        return b"JSON"


class BoundedRoute(APIRoute):
    """A route whose JSON body is read by BoundedRequest, whatever its declared content type."""

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
    """Raises ApiError 415 for a content type that is not JSON; a missing one is taken for it."""
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise ApiError(
            415,
            f"The body is sent as {kind[:80]!r}; {advice}.",
            code="unsupported_media_type",
        )


def parse_json(chunks: list[bytes], limits: Limits) -> Any:
    """The value of a JSON text in UTF-8. Raises ApiError 400.

    `chunks` is emptied, and what they took is given back: nothing but the value is held.
    """
    # Joined once: what grows piece by piece is moved again and again, and leaves gaps.
    data = b"".join(chunks)
    chunks.clear()
    try:
        return _parsed(data, limits)
    except ApiError as error:
        raise error.with_traceback(None) from None  # whose frames hold the data
    finally:
        if len(data) > _LARGE_BYTES:
            del data
            return_freed_memory()


def _parsed(data: bytes, limits: Limits) -> Any:
    data = data.removeprefix(_BOM)
    if not data or data.isspace():
        raise bad_request("The body is empty; send a JSON object.")
    # Signs inside strings count too, but of those only as many as the text may be long.
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
    """Refuse long strings that are more than ASCII: one such character makes all take four bytes.

    Raises ApiError 400.
    """
    if data.count(b'"') > limits.prompt_chars + 4 * limits.json_values:
        raise _too_many(limits)
    start = data.find(b'"')
    while start >= 0:
        stop = data.find(b'"', start + 1)
        while stop >= 0 and _is_escaped(data, stop):
            stop = data.find(b'"', stop + 1)
        if stop < 0:
            return  # not JSON, as the parser will say
        if stop - start > _LONG_STRING and (
            data.find(b"\\", start, stop) >= 0 or not data[start:stop].isascii()
        ):
            raise bad_request(
                f"A string of {stop - start} bytes is too long; only data URLs may be, without "
                "escaped characters.",
                code="request_too_complex",
            )
        start = data.find(b'"', stop + 1)


def _is_escaped(data: bytes, place: int) -> bool:
    before = data[max(0, place - _MAX_BACKSLASHES) : place]
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
