"""The server as one ASGI app: routes, middleware, the web page, and what describes the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import Field
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from neounify.config import ModelConfig
from neounify.image.pixels import trained_sizes
from neounify.serve.http import chat, completions, images
from neounify.serve.http import videos as video_routes
from neounify.serve.http.abilities import capabilities
from neounify.serve.http.config import HttpConfig, HttpMetrics
from neounify.serve.http.decoders import ClipDecoder, MediaDecoder
from neounify.serve.http.errors import RETRY_SECONDS, ApiError, ErrorBody, add_handlers
from neounify.serve.http.fields import AnswerModel
from neounify.serve.http.media import MediaFetcher, ResultStore
from neounify.serve.http.middleware import (
    API,
    PAGE_HEADERS,
    Accounts,
    BrowserMiddleware,
    LimitMiddleware,
)
from neounify.serve.http.serving import ServerState, State
from neounify.serve.http.uploads import UploadBytes
from neounify.serve.http.video_jobs import VideoJobs
from neounify.serve.safety.hooks import Hooks
from neounify.serve.service import Service

DESCRIPTION = (
    "Chat about text, images and videos, generation of images and videos, image editing, and "
    "interleaved answers of text and images. The routes are OpenAI's; fields called extensions are "
    "this server's own."
)

_RANGE_ERRORS = {
    400: ("The Range header cannot be read; write bytes=FIRST-LAST.", "invalid_range"),
    416: ("The file has none of the bytes that Range asks for.", "range_not_satisfiable"),
}
"""By Starlette's status, the message and the code of ours."""


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%;font-size:.9rem}"
    "td,th{border-bottom:1px solid #8884;padding:.25rem .5rem;text-align:left;vertical-align:top}"
    "code{font-size:.95em}:root{color-scheme:light dark}"
    # On a phone a table's columns would be wider than the screen: cells go below each other.
    "@media(max-width:40rem){table,tbody,tr,td{display:block}tr:has(th),td:empty{display:none}"
    "tr{border-bottom:1px solid #8884}td{border:0;padding:.1rem 0}"
    "h2,h3,p,td{overflow-wrap:anywhere}}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
DOCS_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
"""Headers of the page: nothing but its own style."""


def create_app(
    service: Service,
    config: HttpConfig | None = None,
    *,
    hooks: Hooks | None = None,
    registry: CollectorRegistry | None = None,
    ready: Callable[[], bool] = lambda: True,
    states: Callable[[], Mapping[str, str]] = dict,
    page: Path | None = None,
    settings: HttpConfig | None = None,
) -> FastAPI:
    """The ASGI app over `service`.

    `hooks` check prompts and write images; `registry` may hold collectors of the engines, and gets
    those of HTTP; /health asks `ready`, and `states` for the state of each engine by name; `page`
    is a folder of static files for `/`. `settings` is the deprecated name of `config`.
    """
    if settings is not None:
        text = "create_app(settings=…) is deprecated: use config="
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    config = config or settings or HttpConfig()
    metrics = HttpMetrics(registry or CollectorRegistry())
    uploads = _uploads(config)
    state = _state(service, config, Hooks() if hooks is None else hooks, metrics, uploads)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await state.videos.close()
        state.decoder.close()
        state.clip_decoder.close()

    app = FastAPI(
        title="neounify",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses={"default": {"model": ErrorBody, "description": "Every error"}},
    )
    app.state.server = state
    _add_middleware(app, config, metrics, uploads)
    add_handlers(app)
    routers = (chat.router, completions.router, images.router, video_routes.router)
    for router in (*routers, info_router(ready, states)):
        app.include_router(router)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers=DOCS_HEADERS)

    if page is not None:
        app.router.routes.append(_Page("/", _PageFiles(directory=page, html=True), name="page"))
    return app


def _uploads(config: HttpConfig) -> UploadBytes:
    """The bytes of all requests, of which each one alone has room."""
    files = max(config.remote_bytes, config.remote_video_bytes) if config.remote_hosts else 0
    return UploadBytes(max(config.limits.uploads_bytes, config.limits.body_bytes + files))


def _state(
    service: Service,
    config: HttpConfig,
    hooks: Hooks,
    metrics: HttpMetrics,
    uploads: UploadBytes,
) -> ServerState:
    return ServerState(
        service=service,
        config=config,
        hooks=hooks,
        metrics=metrics,
        results=ResultStore(config.result_bytes, config.result_seconds),
        fetcher=MediaFetcher(
            config.remote_hosts,
            max_bytes=config.remote_bytes,
            seconds=config.remote_seconds,
            uploads=uploads,
        ),
        decoder=MediaDecoder(),
        clip_fetcher=MediaFetcher(
            config.remote_hosts,
            max_bytes=config.remote_video_bytes,
            seconds=config.remote_seconds,
            uploads=uploads,
            medium="video",
        ),
        clip_decoder=ClipDecoder(config.limits.video_requests, len(config.keys)),
        videos=VideoJobs(
            max_unfinished=config.limits.video_jobs,
            max_bytes=config.result_bytes,
            seconds=config.result_seconds,
        ),
        started=int(time.time()),
    )


def _add_middleware(
    app: FastAPI, config: HttpConfig, metrics: HttpMetrics, uploads: UploadBytes
) -> None:
    """Adds middleware from the inside out: BrowserMiddleware, added last, sees a request first."""
    accounts = Accounts(
        config.keys,
        requests_per_minute=config.requests_per_minute,
        concurrent=config.concurrent,
    )
    app.add_middleware(
        LimitMiddleware,
        accounts=accounts,
        limits=config.limits,
        metrics=metrics,
        uploads=uploads,
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
            max_age=600,
        )
    app.add_middleware(BrowserMiddleware, hosts=config.allowed_hosts, origins=config.cors_origins)


class _PageFiles(StaticFiles):
    """Static files of the web page, with headers that forbid loading anything from elsewhere."""

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
    """The route of the static files, without the API's paths, so that 405 stays 405."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if f"{scope.get('path', '')}/".startswith(API):
            return Match.NONE, {}
        return super().matches(scope)


class ModelCard(AnswerModel):
    """The served model; `neounify` has its sampling defaults and this server's limits."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    neounify: dict[str, Any]


class ModelList(AnswerModel):
    """All models, of which there is one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(AnswerModel):
    """Whether the process runs and takes requests.

    `engines` by name: "ready", "starting", "failing" (crashed several times, still restarted) or
    "stopped".
    """

    live: bool
    ready: bool
    engines: dict[str, str] = Field(default_factory=dict)


def info_router(ready: Callable[[], bool], states: Callable[[], Mapping[str, str]]) -> APIRouter:
    """Routes that describe the server; `ready` says whether requests are taken."""
    router = APIRouter(tags=["server"])

    @router.get("/v1/models", summary="List the model that is served", response_model=ModelList)
    async def models(state: State) -> dict[str, Any]:
        return {"object": "list", "data": [_model(state)]}

    @router.get(
        "/v1/models/{name:path}",
        summary="Describe the model that is served",
        response_model=ModelCard,
    )
    async def model(name: str, state: State) -> dict[str, Any]:
        state.check_model(name)
        return _model(state)

    @router.get("/health/live", summary="Is the process alive?")
    async def live() -> dict[Literal["live"], bool]:
        return {"live": True}

    health_of: dict[int | str, dict[str, Any]] = {
        status: {"model": Health} for status in (200, 503)
    }

    @router.get(
        "/health/ready",
        summary="Does it take requests?",
        response_class=JSONResponse,
        responses=health_of,
    )
    @router.get("/health", summary="Both", response_class=JSONResponse, responses=health_of)
    async def health() -> Response:
        is_ready = ready()
        content: dict[str, Any] = {"live": True, "ready": is_ready}
        if engines := states():
            content["engines"] = dict(engines)
        headers = None if is_ready else {"Retry-After": str(math.ceil(RETRY_SECONDS))}
        return JSONResponse(content, 200 if is_ready else 503, headers)

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}},
    )
    async def metrics(state: State) -> Response:
        text = await asyncio.to_thread(generate_latest, state.metrics.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _model(state: ServerState) -> dict[str, Any]:
    """OpenAI's model object, and under `neounify` the sampling defaults and the limits."""
    limits, config = state.config.limits, state.service.config
    sampling = config.sampling
    sizes, pixels = trained_sizes(sampling)
    able = capabilities(config, state.config)
    return {
        "id": state.config.model_name,
        "object": "model",
        "created": state.started,
        "owned_by": "neounify",
        "neounify": {
            "capabilities": able,
            "token_side": config.token_size,
            "image_size": "x".join(map(str, sampling.image_size)),
            "trained_sizes": [f"{width}x{height}" for width, height in sizes],
            "trained_pixels": pixels,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "image_guidance": sampling.image_guidance,
            "shift": sampling.shift,
            "solver": sampling.solver,
            "video": _video(config) if "generate_video" in able else None,
            "limits": {
                "prompt_chars": limits.prompt_chars,
                "images": limits.images,
                "output_pixels": limits.output_pixels,
                "output_frames": limits.output_frames,
                "steps": limits.steps,
                "n": limits.n,
                "answer_images": limits.answer_images,
                "tokens": limits.tokens,
            },
        },
    }


def _video(config: ModelConfig) -> dict[str, Any] | None:
    """Frames of a tube, and the sampling defaults of videos; None for a model without them."""
    if config.video is None:
        return None
    defaults = config.sampling.video
    return {
        "tube_frames": config.video.tube_frames,
        "size": "x".join(map(str, defaults.size)),
        "frames": defaults.frames,
        "fps": defaults.fps,
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "shift": defaults.shift,
        "solver": defaults.solver,
    }


def docs_page(api: Mapping[str, Any]) -> str:
    """The HTML page at /docs, from the OpenAPI description; it loads no other files."""
    title = escape(api["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style><h1>{title}</h1><p>{escape(api['info']['description'])}</p>"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>'
        + "".join(_operations(api))
        + "<h2>Types</h2>"
        + "".join(_types(api))
        + "</html>"
    )


def _operations(api: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('summary', ''))}. "
            yield f"{escape(operation.get('description', ''))}</p>"
            contents = operation.get("requestBody", {}).get("content", {})
            for media_type, content in contents.items():
                yield f"<p>Body: <code>{escape(media_type)}</code></p>"
                yield _fields(_resolve(content["schema"], api))
            for media_type, content in operation["responses"]["200"]["content"].items():
                kind = _type(content.get("schema", {"type": ""}))
                yield f"<p>Answer: <code>{escape(media_type)}</code> {escape(kind)}</p>"


def _types(api: Mapping[str, Any]) -> Iterator[str]:
    """The schemas of which bodies and answers consist, without the bodies themselves."""
    for name, schema in api["components"]["schemas"].items():
        if not name.endswith("Body"):
            yield f"<h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p>"
            yield _fields(schema)


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = (
        f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}"
        f"<td>{_default(name, field, required)}<td>{escape(field.get('description', ''))}"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field<th>type<th>default<th>meaning{''.join(rows)}</table>"


def _default(name: str, field: Mapping[str, Any], required: list[str]) -> str:
    if name in required:
        return "required"
    default = field.get("default")
    return "" if default is None else f"<code>{escape(str(default))}</code>"


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in field:
        kinds = (_type(f) for f in field["anyOf"])
        return " | ".join(k for k in kinds if k != "null")
    kind = str(field.get("type", "any"))
    return f"list of {_type(field['items'])}" if kind == "array" and "items" in field else kind


def _resolve(schema: Mapping[str, Any], api: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    resolved: Mapping[str, Any] = api["components"]["schemas"][name] if name else schema
    return resolved
