"""The server as one ASGI app, put together from its parts."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CollectorRegistry
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from neounify.serve.events import Answering
from neounify.serve.http import chat_routes, completions, image_routes
from neounify.serve.http.accounts import Accounts
from neounify.serve.http.browsers import PAGE_HEADERS, BrowserGuard
from neounify.serve.http.context import Context
from neounify.serve.http.docs_page import DOCS_HEADERS, docs_page
from neounify.serve.http.errors import ApiError, ErrorBody
from neounify.serve.http.gate import API, Gate
from neounify.serve.http.handlers import add_handlers
from neounify.serve.http.hooks import HttpHooks, MarkingHooks
from neounify.serve.http.info_routes import info_router
from neounify.serve.http.metrics import HttpMetrics
from neounify.serve.http.pictures import ImageDecoder
from neounify.serve.http.remote import ImageFetcher
from neounify.serve.http.results import ResultStore
from neounify.serve.http.settings import HttpSettings

DESCRIPTION = (
    "Chat about text and pictures, paint, edit, and answer in text and images. The routes are "
    "OpenAI's; fields called extensions are this server's own."
)

_RANGE_ERRORS = {
    400: ("The Range header cannot be read; write bytes=FIRST-LAST.", "invalid_range"),
    416: ("The file has none of the bytes that Range asks for.", "range_not_satisfiable"),
}
"""By Starlette's status, the message and the code of ours."""


def create_app(
    service: Answering,
    settings: HttpSettings | None = None,
    *,
    hooks: HttpHooks | None = None,
    registry: CollectorRegistry | None = None,
    ready: Callable[[], bool] = lambda: True,
    states: Callable[[], Mapping[str, str]] = dict,
    page: Path | None = None,
) -> FastAPI:
    """The app that answers by `service`.

    `hooks` check prompts and mark images; `registry` may hold collectors of the engines, ours
    are added to it; /health asks `ready`, and `states` how the engines are by name; `page` is a
    folder of static files for `/`.
    """
    settings = settings or HttpSettings()
    metrics = HttpMetrics(registry or CollectorRegistry())
    decoder = ImageDecoder()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        decoder.close()

    app = FastAPI(
        title="neounify",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses={"default": {"model": ErrorBody, "description": "Every error"}},
    )
    app.state.context = Context(
        service=service,
        settings=settings,
        hooks=hooks or MarkingHooks(),
        metrics=metrics,
        results=ResultStore(settings.result_bytes, settings.result_seconds),
        fetcher=ImageFetcher(
            settings.remote_hosts,
            max_bytes=settings.remote_bytes,
            seconds=settings.remote_seconds,
        ),
        decoder=decoder,
        started=int(time.time()),
    )
    _add_middleware(app, settings, metrics)
    add_handlers(app)
    routers = (chat_routes.router, completions.router, image_routes.router)
    for router in (*routers, info_router(ready, states)):
        app.include_router(router)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers=DOCS_HEADERS)

    if page is not None:
        app.router.routes.append(_Page("/", _PageFiles(directory=page, html=True), name="page"))
    return app


def _add_middleware(app: FastAPI, settings: HttpSettings, metrics: HttpMetrics) -> None:
    """From the inside out: the guard, added last, sees a request first."""
    accounts = Accounts(
        settings.keys,
        requests_per_minute=settings.requests_per_minute,
        concurrent=settings.concurrent,
    )
    app.add_middleware(Gate, accounts=accounts, limits=settings.limits, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
            max_age=600,
        )
    app.add_middleware(BrowserGuard, hosts=settings.allowed_hosts, origins=settings.cors_origins)


class _PageFiles(StaticFiles):
    """The files of the page, with headers that let it load nothing from elsewhere."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As Starlette does, with our errors for a Range header that cannot be answered."""
        is_refused = False

        async def checked(message: Message) -> None:
            nonlocal is_refused
            if message["type"] == "http.response.start" and message["status"] in _RANGE_ERRORS:
                is_refused = True
                size = Headers(raw=message["headers"]).get("content-range")
                text, code = _RANGE_ERRORS[message["status"]]
                error = ApiError(message["status"], text, code=code)
                headers = {} if size is None else {"Content-Range": size}
                await error.response(headers)(scope, receive, send)
            elif not is_refused:
                await send(message)

        await super().__call__(scope, receive, checked)


class _Page(Mount):
    """The static files; paths of the API are not its business, so that 405 stays 405."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if f"{scope.get('path', '')}/".startswith(API):
            return Match.NONE, {}
        return super().matches(scope)
