"""POST /v1/images/generations and /v1/images/edits; GET /v1/results/NAME."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from neounify.pipeline.trained_sizes import size_advice
from neounify.serve.http.connections import BoundedRoute
from neounify.serve.http.context import Context, Shared
from neounify.serve.http.errors import ApiError
from neounify.serve.http.image_request import (
    ImageBody,
    edit_body_schema,
    read_edit,
    read_image_requests,
)
from neounify.serve.http.media import Form, encode_result, image_metadata, to_base64
from neounify.serve.http.streaming import EVENTS, AnswerModel, json_response, sse_of, start_stream
from neounify.tasks.events import Finished, ImageFinished, Preview, TextPiece
from neounify.tasks.requests import ImageRequest

router = APIRouter(tags=["images"], route_class=BoundedRoute)


class GeneratedImage(AnswerModel):
    """One image: its file in base64, or a URL that is valid for a limited time."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    reasoning_content: str | None = None


class ImageUsage(AnswerModel):
    """Tokens of the prompt, which counts once, and of all images."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[Literal["cached_tokens", "image_tokens", "text_tokens"], int]
    output_tokens_details: dict[Literal["image_tokens", "text_tokens"], int]


class Images(AnswerModel):
    """Generated images."""

    created: int
    data: list[GeneratedImage]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    quality: str
    size: str
    usage: ImageUsage


class ImagesAnswer:
    """The images of one HTTP request in progress; each is one request to the service."""

    def __init__(self, body: ImageBody, requests: Sequence[ImageRequest], context: Context) -> None:
        self._body, self._requests, self._context = body, requests, context
        self._thoughts = [""] * len(requests)
        self._finished: list[Finished] = []
        first = requests[0]
        self._about = {
            "background": "opaque",
            "output_format": body.output_format,
            "quality": body.quality,
            "size": f"{first.width}x{first.height}",
        }

    async def whole(self, http: Request) -> JSONResponse:
        """OpenAI's images response."""
        images: dict[int, dict[str, Any]] = {}
        async with aclosing(self._events()) as events:
            async for number, event in events:
                if isinstance(event, ImageFinished):
                    images[number] = await self._image(number, event, http)
        if len(images) != len(self._requests):
            raise RuntimeError(f"{len(self._requests)} images were due, {len(images)} came")
        content = {
            "created": int(time.time()),
            "data": [images[number] | self._seed_and_thought(number) for number in sorted(images)],
            **self._about,
            "usage": self._usage(),
        }
        size = sum(len(image.get("b64_json", "")) for image in images.values())
        return await json_response(lambda: content, size)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """OpenAI's events of partial and completed images."""
        kind = "image_edit" if self._requests[0].images else "image_generation"
        partial: Counter[int] = Counter()
        finished: dict[int, str] = {}
        async with aclosing(self._events()) as events:
            async for number, event in events:
                if isinstance(event, Preview):
                    fields = {
                        "partial_image_index": partial[number],
                        "step": event.step,
                        "steps": event.steps,
                    }
                    partial[number] += 1
                    image = await self._write(number, event, to_base64)
                    yield await self._event(f"{kind}.partial_image", number, image, fields)
                elif isinstance(event, ImageFinished):
                    finished[number] = await self._write(number, event, to_base64)
                elif isinstance(event, Finished):
                    usage = {"usage": self._usage_of([event])}
                    image = finished.pop(number)
                    yield await self._event(f"{kind}.completed", number, image, usage)

    async def _events(
        self,
    ) -> AsyncGenerator[tuple[int, Preview | ImageFinished | Finished]]:
        groups = [[request] for request in self._requests]
        async with aclosing(self._context.answers(groups, self._body)) as events:
            async for number, event in events:
                if isinstance(event, TextPiece):
                    self._thoughts[number] += event.text
                    continue
                if isinstance(event, Finished):
                    self._finished.append(event)
                if isinstance(event, Preview | ImageFinished | Finished):
                    yield number, event

    async def _write(
        self, number: int, event: Preview | ImageFinished, form: Callable[[bytes], Form]
    ) -> Form:
        context, format = self._context, self._body.output_format
        metadata = image_metadata(self._requests[number], event, context.settings)
        return await encode_result(context.hooks, event.pixels, format, metadata, form)

    async def _image(self, number: int, event: ImageFinished, http: Request) -> dict[str, Any]:
        if self._body.response_format == "b64_json":
            return {"b64_json": await self._write(number, event, to_base64)}
        context, suffix = self._context, self._body.output_format
        file = await self._write(number, event, bytes)
        name = context.results.put(file, f"image/{suffix}", suffix)
        base = context.settings.public_url or str(http.base_url)
        return {"url": f"{base.rstrip('/')}/v1/results/{name}"}

    async def _event(self, kind: str, number: int, image: str, fields: dict[str, Any]) -> bytes:
        data = {
            "type": kind,
            "b64_json": image,
            "created_at": int(time.time()),
            **self._about,
            "index": number,
            **self._seed_and_thought(number),
            **fields,
        }
        return await sse_of(lambda: data, len(image), kind)

    def _seed_and_thought(self, number: int) -> dict[str, Any]:
        thought = self._thoughts[number]
        seed = {"seed": self._requests[number].seed}
        return seed | ({"reasoning_content": thought} if thought else {})

    def _usage(self) -> dict[str, Any]:
        return self._usage_of(self._finished)

    def _usage_of(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """OpenAI's usage. The prompt counts once, as it is the same for all images."""
        prompt, prompt_images = finished[0].prompt_tokens, finished[0].prompt_image_tokens
        images = sum(f.image_tokens for f in finished)
        text = sum(f.completion_tokens for f in finished)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": finished[0].cached_tokens,
                "image_tokens": prompt_images,
                "text_tokens": prompt - prompt_images,
            },
            "output_tokens": images + text,
            "output_tokens_details": {"image_tokens": images, "text_tokens": text},
            "total_tokens": prompt + images + text,
        }


_IMAGES: dict[int | str, dict[str, Any]] = {200: {"model": Images, "content": EVENTS}}


@router.post(
    "/v1/images/generations",
    summary="Generate images from a prompt",
    response_class=JSONResponse,
    responses=_IMAGES,
)
async def generations(body: ImageBody, request: Request, context: Shared) -> Response:
    """In one answer, or with `stream` as events with partial images."""
    return await _generate(body, await read_image_requests(body, (), context), request, context)


@router.post(
    "/v1/images/edits",
    summary="Edit images by an instruction",
    response_class=JSONResponse,
    responses=_IMAGES,
    openapi_extra={"requestBody": edit_body_schema()},
)
async def edits(request: Request, context: Shared) -> Response:
    """A form with files or JSON with URLs: the fields of a generation, and one or more images."""
    body, images = await read_edit(request, context)
    return await _generate(body, await read_image_requests(body, images, context), request, context)


@router.get(
    "/v1/results/{name}",
    summary="Fetch an image",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}, "description": "The image's file"}},
)
async def results(name: str, context: Shared) -> Response:
    """An image that was generated with `response_format: "url"`; its name is the permission."""
    result = context.results.get(name)
    if result is None:
        raise ApiError(404, "There is no such result, or it is no longer kept.", code="not_found")
    seconds = context.results.seconds_left(result)
    headers = {"Cache-Control": f"private, max-age={seconds}"}
    return Response(result.data, media_type=result.media_type, headers=headers)


async def _generate(
    body: ImageBody, requests: list[ImageRequest], http: Request, context: Context
) -> Response:
    answer = ImagesAnswer(body, requests, context)
    response = await start_stream(answer.chunks()) if body.stream else await answer.whole(http)
    advice = size_advice(context.service.config, requests[0].width, requests[0].height)
    if advice is not None:
        response.headers["Neounify-Warning"] = advice
    return response
