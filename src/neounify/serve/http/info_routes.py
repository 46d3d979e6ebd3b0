"""What can be asked about the server itself: its model, its health, its metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from neounify.pipeline.trained_sizes import trained_sizes
from neounify.serve.http.answer_schema import Health, ModelCard, ModelList, Responses
from neounify.serve.http.context import Context, Shared
from neounify.serve.http.errors import RETRY_SECONDS


def info_router(ready: Callable[[], bool], states: Callable[[], Mapping[str, str]]) -> APIRouter:
    """The routes; `ready` says whether requests would be taken, `states` how the engines are."""
    router = APIRouter(tags=["server"])

    @router.get("/v1/models", summary="List the model that is served", response_model=ModelList)
    async def models(context: Shared) -> dict[str, Any]:
        return {"object": "list", "data": [_model(context)]}

    @router.get(
        "/v1/models/{name:path}",
        summary="Describe the model that is served",
        response_model=ModelCard,
    )
    async def model(name: str, context: Shared) -> dict[str, Any]:
        context.check_model(name)
        return _model(context)

    @router.get("/health/live", summary="Is the process alive?")
    async def live() -> dict[Literal["live"], bool]:
        return {"live": True}

    health_of: Responses = {status: {"model": Health} for status in (200, 503)}

    @router.get(
        "/health/ready",
        summary="Does it take requests?",
        response_class=JSONResponse,
        responses=health_of,
    )
    @router.get("/health", summary="Both", response_class=JSONResponse, responses=health_of)
    async def health() -> Response:
        is_ready = ready()
        found: dict[str, Any] = {"live": True, "ready": is_ready}
        if engines := states():
            found["engines"] = dict(engines)
        headers = None if is_ready else {"Retry-After": str(math.ceil(RETRY_SECONDS))}
        return JSONResponse(found, 200 if is_ready else 503, headers)

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}},
    )
    async def metrics(context: Shared) -> Response:
        text = await asyncio.to_thread(generate_latest, context.metrics.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _model(context: Context) -> dict[str, Any]:
    """OpenAI's model object, and under `neounify` what a client needs for its settings."""
    config, limits = context.service.config, context.settings.limits
    own = config.sampling
    sizes, pixels = trained_sizes(own)
    return {
        "id": context.settings.model_name,
        "object": "model",
        "created": context.started,
        "owned_by": "neounify",
        "neounify": {
            "token_side": config.token_size,
            "image_size": "x".join(map(str, own.image_size)),
            "trained_sizes": [f"{width}x{height}" for width, height in sizes],
            "trained_pixels": pixels,
            "steps": own.steps,
            "guidance": own.guidance,
            "image_guidance": own.image_guidance,
            "shift": own.shift,
            "limits": {
                "prompt_chars": limits.prompt_chars,
                "images": limits.images,
                "output_pixels": limits.output_pixels,
                "steps": limits.steps,
                "n": limits.n,
                "answer_images": limits.answer_images,
                "tokens": limits.tokens,
            },
        },
    }
