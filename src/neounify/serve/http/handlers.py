"""Every error that leaves a route, as an answer in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from neounify.errors import NeounifyError
from neounify.serve.http.errors import INTERNAL, ApiError, bad_request, to_api_error

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_UNROUTED = "Not Found"


def add_handlers(app: FastAPI) -> None:
    """Have the app answer with our errors only."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(NeounifyError, _ours)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(_: Request, error: Exception) -> Response:
    answer = to_api_error(error)
    if answer is INTERNAL:
        raise error  # to the server's log; the outermost handler answers
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
        headers["Allow"] = _with_implied(headers.get("Allow", ""))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
        message = f"{request.method[:20]} is not allowed here, only {headers['Allow']}."
    elif error.status_code == 404 and message == _UNROUTED and request.url.path.startswith("/v1"):
        message = f"There is no {request.url.path[:100]} here. There is: {_listed(request.app)}."
    return ApiError(error.status_code, f"{message.rstrip('.')}.", code=code).response(headers)


def _with_implied(allowed: str) -> str:
    """An Allow header with the methods that every route takes besides its own."""
    methods = [method.strip() for method in allowed.split(",") if method.strip()]
    implied = (*(["HEAD"] if "GET" in methods else ()), "OPTIONS")
    return ", ".join(dict.fromkeys((*methods, *implied)))


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
    # Of a union every branch complains; the one that got furthest was meant.
    worst: dict[str, Any] = max(error.errors(), key=lambda e: len(e["loc"]))
    param = _param(worst["loc"][1:], error.body, missing=worst["type"] == "missing")
    text = "this field is not known" if worst["type"] == "extra_forbidden" else worst["msg"]
    return bad_request(f"{param or 'body'}: {text}"[:500], param, "invalid_value").response()


def _param(loc: Sequence[int | str], body: Any, *, missing: bool) -> str | None:
    """The path to a field as the caller wrote it, without pydantic's names of union branches."""
    path: list[str] = []
    if loc and isinstance(body, dict) and loc[0] not in body:
        # The caller used another server's name for the field, or left it out.
        return str(loc[0])[:80]
    for step in loc:
        inside = step in body if isinstance(body, dict) else _is_place(step, body)
        if inside:
            body = body[step]
        elif not (missing and step is loc[-1]):
            continue
        path.append(str(step)[:80])
    return ".".join(path) or None


def _is_place(step: int | str, body: Any) -> bool:
    return isinstance(body, list) and isinstance(step, int) and step < len(body)
