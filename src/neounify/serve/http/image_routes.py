"""POST /v1/images/generations and /v1/images/edits; GET /v1/results/NAME."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from neounify.pipeline.request import PaintRequest
from neounify.pipeline.trained_sizes import size_advice
from neounify.serve.http.answer_schema import EVENTS, Images, Responses
from neounify.serve.http.body import BoundedRoute
from neounify.serve.http.context import Context, Shared
from neounify.serve.http.edit_body import edit_body_schema, read_edit
from neounify.serve.http.errors import ApiError
from neounify.serve.http.image_answer import ImagesAnswer
from neounify.serve.http.image_request import read_paint
from neounify.serve.http.image_schema import ImageBody
from neounify.serve.http.sse import start_stream

router = APIRouter(tags=["images"], route_class=BoundedRoute)
_IMAGES: Responses = {200: {"model": Images, "content": EVENTS}}


@router.post(
    "/v1/images/generations",
    summary="Paint images of a prompt",
    response_class=JSONResponse,
    responses=_IMAGES,
)
async def generations(body: ImageBody, request: Request, context: Shared) -> Response:
    """In one answer, or with `stream` as events with partial images."""
    return await _paint(body, await read_paint(body, (), context), request, context)


@router.post(
    "/v1/images/edits",
    summary="Paint an image from pictures and an instruction",
    response_class=JSONResponse,
    responses=_IMAGES,
    openapi_extra={"requestBody": edit_body_schema()},
)
async def edits(request: Request, context: Shared) -> Response:
    """A form with files or JSON with URLs: the fields of a generation, and one or more images."""
    body, images = await read_edit(request, context)
    return await _paint(body, await read_paint(body, images, context), request, context)


@router.get(
    "/v1/results/{name}",
    summary="Fetch an image",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}, "description": "The image's file"}},
)
async def results(name: str, context: Shared) -> Response:
    """An image that was painted with `response_format: "url"`; its name is the permission."""
    result = context.results.get(name)
    if result is None:
        raise ApiError(404, "There is no such result, or it is no longer kept.", code="not_found")
    seconds = context.results.seconds_left(result)
    headers = {"Cache-Control": f"private, max-age={seconds}"}
    return Response(result.data, media_type=result.media_type, headers=headers)


async def _paint(
    body: ImageBody, requests: list[PaintRequest], http: Request, context: Context
) -> Response:
    answer = ImagesAnswer(body, requests, context)
    response = await start_stream(answer.chunks()) if body.stream else await answer.whole(http)
    advice = size_advice(context.service.config, requests[0].width, requests[0].height)
    if advice is not None:
        response.headers["Neounify-Warning"] = advice
    return response
