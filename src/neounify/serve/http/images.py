"""POST /v1/images/generations and /v1/images/edits; GET /v1/results/NAME."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import PIL.Image
from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from neounify.errors import ImageError
from neounify.image.pixels import size_advice
from neounify.serve.http.config import MEBIBYTE
from neounify.serve.http.connections import (
    BoundedRoute,
    PiecesResponse,
    add_warnings,
    check_json_type,
)
from neounify.serve.http.errors import ApiError, bad_request
from neounify.serve.http.fields import AnswerModel, ImageFields, LimitedText, blame, seeds_of
from neounify.serve.http.serving import (
    EVENTS,
    ServerState,
    State,
    json_response,
    sse_of,
    start_stream,
    to_base64,
)
from neounify.tasks.image import MAX_IMAGES_PER_PROMPT, ImageRequest
from neounify.tasks.program import Finished, ImageFinished, Preview, TextPiece

router = APIRouter(tags=["images"], route_class=BoundedRoute)
Form = TypeVar("Form")
Body = TypeVar("Body", bound=BaseModel)
Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]

STEPS_OF_QUALITY: Mapping[str, float] = {
    "low": 0.25,
    "medium": 0.5,
    "high": 1.0,
    "auto": 1.0,
    "standard": 1.0,
    "hd": 1.0,
}
"""The share of the checkpoint's default steps."""
_MAX_FIELDS = 64
_IMAGE_FIELDS = ("image", "image[]", "images", "images[]", "image_url", "image_urls")


# --- requests ---


class ImageBody(ImageFields):
    """Fields of image generation and editing, without the input images of an edit."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        ("input_fidelity", "moderation", "output_compression", "safety_identifier", "style", "user")
    )
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": ("auto", "opaque"),
        "complexity": (),
        "enable_safety_checker": (True,),
        "frame_count": (),
        "frame_duration_ms": (),
        "mask": (),
        "markup": (),
        "num_frames": (1,),
        "prompt_extend": (False,),
        "strength": (1,),
        "svg": (),
        "watermark": (False,),
    }

    model: str = Field("", max_length=200)
    prompt: LimitedText
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_PROMPT)] = Field(
        1, description="Image i has seed + i and equals the single image of that seed."
    )
    quality: Quality = Field(
        "auto", description="low: a quarter of the checkpoint's steps; medium: half; else all."
    )
    response_format: Literal["b64_json", "url"] = "b64_json"

    def steps_of(self, default: int) -> int | None:
        """The number of steps, for a checkpoint with `default` steps; None with `fast` alone."""
        if self.steps is not None or (self.fast is not None and self.quality == "auto"):
            return self.steps
        return max(1, round(STEPS_OF_QUALITY[self.quality] * default))


async def read_image_request(
    body: ImageBody, images: tuple[PIL.Image.Image, ...], state: ServerState
) -> ImageRequest:
    """The request of all `n` images, with consecutive seeds; their prompt is prefilled once.

    Raises ApiError, PromptError, ImageError, RequestError and Refused.
    """
    state.check_model(body.model)
    state.check_n(body.n)
    if body.stream and body.response_format == "url":
        raise bad_request("response_format: a stream sends b64_json only", "response_format")
    if body.response_format == "url" and not state.config.result_urls:
        raise bad_request(
            "response_format: this server keeps no results; ask for b64_json", "response_format"
        )
    if not body.prompt.strip():
        raise bad_request("prompt: is empty; describe the image", "prompt", "invalid_prompt")
    texts = (body.prompt, body.negative_prompt)
    await state.check_prompt(filter(None, texts), images)
    width, height = state.size(body, images[0] if images else None)
    steps = body.steps_of(state.service.config.sampling.steps)
    sampling = state.sampling(body, editing=bool(images), steps=steps)
    seeds = seeds_of(body.seed, body.n)
    return ImageRequest(
        prompt=body.prompt,
        width=width,
        height=height,
        sampling=sampling,
        images=images,
        seed=seeds[0],
        seeds=tuple(seeds),
        count=body.n,
        think=bool(body.think),
        negative_prompt=body.negative_prompt,
    )


async def read_edit(
    request: Request, state: ServerState
) -> tuple[ImageBody, tuple[PIL.Image.Image, ...]]:
    """The fields and the images, in order. Raises ApiError, RequestValidationError."""
    kind = request.headers.get("content-type")
    if (kind or "").partition(";")[0].strip().lower() == "multipart/form-data":
        return await _read_form(request, state)
    check_json_type(
        kind,
        "send an edit as multipart/form-data with files, or as application/json with URLs of "
        "images",
    )
    return await _read_json(await request.json(), state)


async def _read_form(
    request: Request, state: ServerState
) -> tuple[ImageBody, tuple[PIL.Image.Image, ...]]:
    limits = state.config.limits
    async with request.form(
        max_files=limits.images + 1, max_fields=_MAX_FIELDS, max_part_size=4 * MEBIBYTE
    ) as form:
        body = validated(ImageBody, form_values(form, _IMAGE_FIELDS))
        sources = [("image", item) for name in _IMAGE_FIELDS for item in form.getlist(name)]
        return body, await _read_images(sources, body, state)


async def _read_json(
    value: Any, state: ServerState
) -> tuple[ImageBody, tuple[PIL.Image.Image, ...]]:
    if not isinstance(value, dict):
        raise bad_request(f"The body must be a JSON object, got {str(value)[:40]!r}.")
    names = [name for name in _IMAGE_FIELDS if value.get(name) is not None]
    if len(names) > 1:
        raise bad_request(f"{names[0]} and {names[1]}: give one of them", names[1])
    fields = {n: v for n, v in value.items() if n not in _IMAGE_FIELDS}
    body = validated(ImageBody, fields)
    [name] = names or ["images"]
    entries = value.get(name)
    items: list[Any] = [] if entries is None else [entries]
    if isinstance(entries, list):
        items = entries
    sources = []
    for index, item in enumerate(items):
        field = name if items is not entries else f"{name}.{index}"
        with blame(field):
            sources.append((field, _url_of(item)))
    return body, await _read_images(sources, body, state)


async def _read_images(
    sources: Sequence[tuple[str, str | UploadFile]], body: ImageBody, state: ServerState
) -> tuple[PIL.Image.Image, ...]:
    if not sources:
        raise bad_request(
            "image: at least one is needed: a file in a form, or in JSON "
            '"images": [{"image_url": "data:image/png;base64,…"}]',
            "image",
        )
    return tuple(await state.deadline(body).bound(state.read_images(sources, "image")))


def _url_of(item: Any) -> str:
    """The URL in an entry of `images`: a string, or one in the objects that clients write."""
    for key in ("image_url", "url"):
        if isinstance(item, dict) and item.get(key) is not None:
            item = item[key]
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and item.get("file_id") is not None:
        raise ImageError("file_id: this server keeps no files; send the image as a data URL")
    raise ImageError(f"an image is a URL, or an object with image_url, got {str(item)[:40]!r}")


def edit_body_schema() -> dict[str, Any]:
    """Both media types of an edit's body for OpenAPI, as the route declares none."""
    file = {"type": "string", "format": "binary", "contentMediaType": "image/*"}
    form = _schema("EditForm", "image", file, "The images to edit, in order; also as `image[]`.")
    url = {"type": "string", "description": "A data URL, or a URL that this server may fetch."}
    entry = {"type": "object", "properties": {"image_url": url}, "required": ["image_url"]}
    text = "The images to edit, in order; also as `image`, a URL or several."
    json = _schema("EditBody", "images", entry, text)
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": json}}
    return {"required": True, "content": content}


def _schema(title: str, name: str, item: dict[str, Any], description: str) -> dict[str, Any]:
    schema = ImageBody.model_json_schema()
    images = {"description": description, "type": "array", "items": item, "minItems": 1}
    schema["properties"] |= {name: images}
    schema["required"] = [*schema["required"], name]
    schema["title"] = title
    return schema


def form_values(form: FormData, files: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a form without those of `files`. A name that ends in [] is a list."""
    fields: dict[str, Any] = {}
    for name in form:
        values = form.getlist(name)
        if name in files:
            continue
        if name.endswith("[]"):
            fields[name[:-2]] = values
        elif len(values) > 1:
            raise bad_request(f"{name[:80]}: given {len(values)} times", name[:80])
        else:
            fields[name] = values[0]
    return fields


def validated(kind: type[Body], fields: dict[str, Any]) -> Body:
    """The body of that kind. Raises RequestValidationError as FastAPI does."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError(
            [e | {"loc": ("body", *e["loc"])} for e in errors], body=fields
        ) from error


# --- answers ---


class GeneratedImage(AnswerModel):
    """One image: its file in base64, or a URL that is valid for a limited time.

    `evaluations` of the network were spent on it, each guidance branch counted.
    """

    b64_json: str | None = None
    url: str | None = None
    seed: int
    evaluations: float
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
    """The images of one request in progress."""

    def __init__(self, body: ImageBody, request: ImageRequest, state: ServerState) -> None:
        self._body, self._request, self._state = body, request, state
        self._thought = ""
        self._about = {
            "background": "opaque",
            "output_format": body.output_format,
            "quality": body.quality,
            "size": f"{request.width}x{request.height}",
        }

    async def whole(self, http: Request) -> JSONResponse:
        """OpenAI's images response."""
        images: dict[int, dict[str, Any]] = {}
        usage: dict[str, Any] = {}
        async with aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, ImageFinished):
                    spent = {"evaluations": event.evaluations}
                    images[event.index] = await self._image(event, http) | spent
                elif isinstance(event, Finished):
                    usage = image_usage(event)
        if len(images) != self._request.count:
            raise RuntimeError(f"{self._request.count} images were due, {len(images)} came")
        content = {
            "created": int(time.time()),
            "data": [images[index] | self._seed_and_thought(index) for index in sorted(images)],
            **self._about,
            "usage": usage,
        }
        size = sum(len(image.get("b64_json", "")) for image in images.values())
        return await json_response(lambda: content, size)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """OpenAI's events of partial and completed images."""
        kind = "image_edit" if self._request.images else "image_generation"
        previews: Counter[int] = Counter()
        fields: dict[str, Any]
        async with aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, Preview):
                    fields = {
                        "partial_image_index": previews[event.index],
                        "step": event.step,
                        "steps": event.steps,
                    }
                    previews[event.index] += 1
                    yield await self._chunk(f"{kind}.partial_image", event, fields)
                elif isinstance(event, ImageFinished):
                    fields = {
                        "evaluations": event.evaluations,
                        "usage": image_usage(event.usage),
                    }
                    yield await self._chunk(f"{kind}.completed", event, fields)

    async def _events(self) -> AsyncGenerator[Preview | ImageFinished | Finished]:
        async with aclosing(self._state.answers([[self._request]], self._body)) as events:
            async for _, event in events:
                if isinstance(event, TextPiece):
                    self._thought += event.text
                elif isinstance(event, Preview | ImageFinished | Finished):
                    yield event

    async def _encode(self, event: Preview | ImageFinished, form: Callable[[bytes], Form]) -> Form:
        return await self._state.encode(self._request, event, self._body.output_format, form)

    async def _image(self, event: ImageFinished, http: Request) -> dict[str, Any]:
        if self._body.response_format == "b64_json":
            return {"b64_json": await self._encode(event, to_base64)}
        state, suffix = self._state, self._body.output_format
        file = await self._encode(event, bytes)
        name = state.results.put(file, f"image/{suffix}", suffix)
        base = state.config.public_url or str(http.base_url)
        return {"url": f"{base.rstrip('/')}/v1/results/{name}"}

    async def _chunk(
        self, kind: str, event: Preview | ImageFinished, fields: dict[str, Any]
    ) -> bytes:
        image = await self._encode(event, to_base64)
        data = {
            "type": kind,
            "b64_json": image,
            "created_at": int(time.time()),
            **self._about,
            "index": event.index,
            **self._seed_and_thought(event.index),
            **fields,
        }
        return await sse_of(lambda: data, len(image), kind)

    def _seed_and_thought(self, index: int) -> dict[str, Any]:
        seed = {"seed": self._request.seeds[index]}
        return seed | ({"reasoning_content": self._thought} if self._thought else {})


def image_usage(counts: Finished) -> dict[str, Any]:
    """OpenAI's usage of images; their prompt and thought count once."""
    images, text = counts.image_tokens, counts.completion_tokens
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": counts.cached_tokens,
            "image_tokens": counts.prompt_image_tokens,
            "text_tokens": counts.prompt_tokens - counts.prompt_image_tokens,
        },
        "output_tokens": images + text,
        "output_tokens_details": {"image_tokens": images, "text_tokens": text},
        "total_tokens": counts.prompt_tokens + images + text,
    }


_IMAGES: dict[int | str, dict[str, Any]] = {200: {"model": Images, "content": EVENTS}}


@router.post(
    "/v1/images/generations",
    summary="Generate images from a prompt",
    response_class=JSONResponse,
    responses=_IMAGES,
)
async def generations(body: ImageBody, request: Request, state: State) -> Response:
    """In one answer, or with `stream` as events with partial images."""
    return await _generate(body, await read_image_request(body, (), state), request, state)


@router.post(
    "/v1/images/edits",
    summary="Edit images by an instruction",
    response_class=JSONResponse,
    responses=_IMAGES,
    openapi_extra={"requestBody": edit_body_schema()},
)
async def edits(request: Request, state: State) -> Response:
    """A form with files or JSON with URLs: the fields of a generation, and one or more images."""
    body, images = await read_edit(request, state)
    return await _generate(body, await read_image_request(body, images, state), request, state)


@router.get(
    "/v1/results/{name}",
    summary="Fetch an image",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}, "description": "The image's file"}},
)
async def results(name: str, state: State) -> Response:
    """An image that was generated with `response_format: "url"`; its name is the permission."""
    result = state.results.get(name)
    if result is None:
        seconds = state.config.result_seconds
        raise ApiError(
            404,
            f"There is no result {name[:80]!r}; results are kept for {seconds:g} seconds at most.",
            code="not_found",
        )
    seconds = state.results.seconds_left(result)
    headers = {"Cache-Control": f"private, max-age={seconds}"}
    return PiecesResponse(result.data, media_type=result.media_type, headers=headers)


async def _generate(
    body: ImageBody, request: ImageRequest, http: Request, state: ServerState
) -> Response:
    answer = ImagesAnswer(body, request, state)
    response = await start_stream(answer.chunks()) if body.stream else await answer.whole(http)
    advice = size_advice(state.service.config, request.width, request.height)
    add_warnings(response, [] if advice is None else [advice])
    return response
