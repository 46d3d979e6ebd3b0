"""Errors as OpenAI's clients expect them: {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Mount

from neounify.errors import (
    DeadlineExceeded,
    DecoderStopped,
    Draining,
    EngineDied,
    ImageError,
    InputError,
    NeounifyError,
    OutOfMemory,
    Overloaded,
    PromptError,
    RequestError,
    TensorsGone,
    VideoError,
)
from neounify.serve.safety.hooks import Refused

INVALID = "invalid_request_error"

# Two or more steps of an absolute path, but no route of ours, and nothing inside a URL, a fraction
# or a word.
_PATH = re.compile(r"(?<![\w.:/-])(?!/v1/)(?:[A-Za-z]:[\\/]|/)[\w.@+~-]+(?:[\\/][\w.@+~-]+)+")
_ADDRESS = re.compile(r"\s*(?:object )?at 0x[0-9a-fA-F]+")

PYTHON_NAMES: Mapping[str, str] = {
    "images_per_prompt": "n",
    "max_new_tokens": "max_tokens",
    "width": "size",
    "height": "size",
}
"""By the name of a parameter in Python, the field of the API, where they differ."""

MAX_MESSAGE, MAX_PARAM = 1000, 200
"""Maximum characters of an error's message and of a field's name; both may hold callers' text."""

RETRY_SECONDS = 2.0
"""Retry-After while an engine is being started, in seconds."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_UNROUTED = "Not Found"


class ApiError(HTTPException):
    """An error answer; `param` is the field at fault, `retry_after` is in seconds.

    An HTTPException, because FastAPI turns all other errors while it reads a body into 400.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message)
        self.kind = kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        message = sanitise(shorten(self.detail, MAX_MESSAGE))
        param = None if self.param is None else shorten(self.param, MAX_PARAM)
        error = ErrorDetail(message=message, type=self.kind, param=param, code=self.code)
        return ErrorBody(error=error).model_dump()

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The response, with `headers` besides its own."""
        all_headers = dict(headers or {})
        if self.retry_after is not None:
            all_headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status_code == 401:
            all_headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status_code, all_headers)


class ErrorDetail(BaseModel):
    """Description of an error; `param` is the field at fault, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every error answer."""

    error: ErrorDetail


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An ApiError 400: the request has to be changed."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, retry_after: float) -> ApiError:
    """An ApiError 429: the same request may succeed in `retry_after` seconds."""
    return ApiError(
        429, message, kind="rate_limit_error", code="overloaded", retry_after=retry_after
    )


@dataclass(frozen=True)
class _Answer:
    status: int
    kind: str
    code: str
    message: str | None = None


# `message` None: the error's own, where it is written for callers. Subclasses come first.
_KNOWN: dict[type[NeounifyError], _Answer] = {
    PromptError: _Answer(400, INVALID, "invalid_prompt"),
    ImageError: _Answer(400, INVALID, "invalid_image"),
    DecoderStopped: _Answer(503, "server_error", "decoder_stopped"),
    VideoError: _Answer(400, INVALID, "invalid_video"),
    RequestError: _Answer(400, INVALID, "invalid_value"),
    Refused: _Answer(400, INVALID, "content_policy_violation"),
    Overloaded: _Answer(429, "rate_limit_error", "overloaded"),
    DeadlineExceeded: _Answer(504, "timeout_error", "deadline_exceeded"),
    EngineDied: _Answer(
        503,
        "server_error",
        "engine_restarting",
        "The engine that worked on this request stopped and is being started again; try again.",
    ),
    OutOfMemory: _Answer(
        503,
        "server_error",
        "out_of_memory",
        "The server has no memory left for this request at the moment; try again.",
    ),
    TensorsGone: _Answer(
        503,
        "server_error",
        "request_lost",
        "Parts of this request were lost between the engines; try again.",
    ),
    Draining: _Answer(
        503,
        "server_error",
        "shutting_down",
        "The server is shutting down and takes no new requests; try again soon.",
    ),
}

INTERNAL = ApiError(
    500,
    "The server failed to answer this request. The details are in its log.",
    kind="server_error",
    code="internal_error",
)


def to_api_error(error: BaseException) -> ApiError:
    """The ApiError for any error; a plain 500 where its message is not meant for callers."""
    if isinstance(error, ApiError):
        return error
    for kind, answer in _KNOWN.items():
        if isinstance(error, kind):
            return ApiError(
                answer.status,
                str(error) if answer.message is None else answer.message,
                kind=answer.kind,
                param=param_of(error),
                code=answer.code,
                retry_after=_retry_after(error),
            )
    return INTERNAL


def param_of(error: BaseException) -> str | None:
    """The field at fault, under the API's own name."""
    param = error.param if isinstance(error, InputError) else None
    return None if param is None else PYTHON_NAMES.get(param, param)


def shorten(text: str, max_chars: int) -> str:
    """The text, or its beginning and end when it is longer than `max_chars`.

    Halves of surrogate pairs, which are not UTF-8, are replaced.
    """
    if len(text) > max_chars:
        text = f"{text[: max_chars * 2 // 3]} … {text[-(max_chars // 3) :]}"
    return text.encode("utf-8", "replace").decode("utf-8")


def sanitise(message: str) -> str:
    """The message without paths of the server or addresses in its memory."""
    return _ADDRESS.sub("", _PATH.sub("…", message))


def _retry_after(error: BaseException) -> float | None:
    if isinstance(error, Overloaded):
        return error.retry_after
    unavailable = EngineDied | OutOfMemory | TensorsGone | Draining | DecoderStopped
    return RETRY_SECONDS if isinstance(error, unavailable) else None


def add_handlers(app: FastAPI) -> None:
    """Register the handlers by which all errors of the app are answered in OpenAI's form."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(NeounifyError, _ours)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(_: Request, error: Exception) -> Response:
    answer = to_api_error(error)
    if answer is INTERNAL:
        raise error  # logged by the server and answered by the outermost handler
    return answer.response()


async def _unexpected(_: Request, __: Exception) -> Response:
    return INTERNAL.response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    phrase = HTTPStatus(error.status_code).phrase
    message = error.detail if isinstance(error.detail, str) and error.detail else phrase
    code = _CODES.get(error.status_code, "bad_request")
    headers = {name.title(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
        message = f"{request.method[:20]} is not allowed here, only {headers['Allow']}."
    elif error.status_code == 404 and message == _UNROUTED and request.url.path.startswith("/v1"):
        message = f"There is no {request.url.path[:100]} here. There is: {_listed(request.app)}."
    return ApiError(error.status_code, f"{message.rstrip('.')}.", code=code).response(headers)


def _allowed(request: Request) -> list[str]:
    """The methods of every route of a path, with those that are taken besides them."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        # Static files match with any method, and take these.
        return any(
            route.matches(scope)[0] is Match.FULL
            and (method == "GET" or not isinstance(route, Mount))
            for route in request.app.routes
        )

    methods = set(filter(takes, ("GET", "POST", "PUT", "PATCH", "DELETE")))
    implied = {"HEAD"} if "GET" in methods else set()
    return sorted(methods | implied | {"OPTIONS"})


def _listed(app: FastAPI) -> str:
    """The routes of the API, such as "POST /v1/chat/completions"."""
    operations = app.openapi()["paths"].items()
    return ", ".join(
        f"{method.upper()} {path}"
        for path, methods in operations
        for method in methods
        if path.startswith("/v1/")
    )


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Every branch of a union reports errors; the deepest is of the branch that was meant.
    worst: dict[str, Any] = max(error.errors(), key=lambda e: len(e["loc"]))
    part, *loc = worst["loc"]
    param = _param(loc, error.body, missing=worst["type"] == "missing")
    if part == "query":
        param = str(loc[0])
    text = "this field is not known" if worst["type"] == "extra_forbidden" else worst["msg"]
    return bad_request(f"{param or 'body'}: {text}"[:500], param, "invalid_value").response()


def _param(loc: Sequence[int | str], body: Any, *, missing: bool) -> str | None:
    """The path to a field as the caller wrote it, without pydantic's names of union branches."""
    path: list[str] = []
    if loc and isinstance(body, dict) and loc[0] not in body:
        # The caller used another server's name for the field, or left it out.
        return str(loc[0])[:80]
    for step in loc:
        inside = step in body if isinstance(body, dict) else _is_index(step, body)
        if inside:
            body = body[step]
        elif not (missing and step is loc[-1]):
            continue
        path.append(str(step)[:80])
    return ".".join(path) or None


def _is_index(step: int | str, body: Any) -> bool:
    return isinstance(body, list) and isinstance(step, int) and step < len(body)
