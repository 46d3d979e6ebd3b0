"""Bodies of image generation and editing, turned into requests to the service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import PIL.Image
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from neounify.errors import ImageError
from neounify.serve.http.connections import check_json_type
from neounify.serve.http.context import Context, seed_or_random
from neounify.serve.http.errors import bad_request, blame
from neounify.serve.http.fields import MAX_TEXT, ImageFields, seeds_of
from neounify.serve.http.media import RequestImages
from neounify.serve.http.settings import MEBIBYTE
from neounify.tasks.requests import ImageRequest

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
    prompt: Annotated[str, Field(max_length=MAX_TEXT)]
    n: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Image i has seed + i and equals the single image of that seed."
    )
    quality: Quality = Field(
        "auto", description="low: a quarter of the checkpoint's steps; medium: half; else all."
    )
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False

    def steps_of(self, default: int) -> int:
        """The number of steps, for a checkpoint with `default` steps."""
        if self.steps is not None:
            return self.steps
        return max(1, round(STEPS_OF_QUALITY[self.quality] * default))


async def read_image_requests(
    body: ImageBody, images: tuple[PIL.Image.Image, ...], context: Context
) -> list[ImageRequest]:
    """One request per image, with consecutive seeds.

    Not one request of several images, since those share one draw of noise: image i would then
    depend on their number, and its seed alone could not reproduce it.

    Raises ApiError, PromptError, ImageError, RequestError and Refused.
    """
    context.check_model(body.model)
    context.check_n(body.n)
    if body.stream and body.response_format == "url":
        raise bad_request("response_format: a stream sends b64_json only", "response_format")
    if body.response_format == "url" and not context.settings.result_urls:
        raise bad_request(
            "response_format: this server keeps no results; ask for b64_json", "response_format"
        )
    if not body.prompt.strip():
        raise bad_request("prompt: a text is needed", "prompt", "invalid_prompt")
    texts = (body.prompt, body.negative_prompt)
    await context.check_prompt(filter(None, texts), images)
    width, height = context.size(body, images[0] if images else None)
    steps = body.steps_of(context.service.config.sampling.steps)
    sampling = context.sampling(body, editing=bool(images), steps=steps)
    return [
        ImageRequest(
            prompt=body.prompt,
            width=width,
            height=height,
            sampling=sampling,
            images=images,
            seed=seed,
            think=bool(body.think),
            negative_prompt=body.negative_prompt,
        )
        for seed in seeds_of(seed_or_random(body.seed), body.n)
    ]


async def read_edit(
    request: Request, context: Context
) -> tuple[ImageBody, tuple[PIL.Image.Image, ...]]:
    """The fields and the images, in order. Raises ApiError, RequestValidationError."""
    kind = request.headers.get("content-type")
    if (kind or "").partition(";")[0].strip().lower() == "multipart/form-data":
        return await _read_form(request, context)
    check_json_type(
        kind,
        "send an edit as multipart/form-data with files, or as application/json with URLs of "
        "images",
    )
    return await _read_json(await request.json(), context)


async def _read_form(
    request: Request, context: Context
) -> tuple[ImageBody, tuple[PIL.Image.Image, ...]]:
    limits = context.settings.limits
    async with request.form(
        max_files=limits.images + 1, max_fields=_MAX_FIELDS, max_part_size=4 * MEBIBYTE
    ) as form:
        body = _fields(form)
        items = [item for name in _IMAGE_FIELDS for item in form.getlist(name)]
        reader = _input_images(len(items), context)
        images = []
        for item in items:
            with blame("image"):
                if isinstance(item, UploadFile):
                    images.append(await reader.read(await item.read()))
                else:
                    images.append(await reader.read_url(item))
    return body, tuple(images)


async def _read_json(value: Any, context: Context) -> tuple[ImageBody, tuple[PIL.Image.Image, ...]]:
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.")
    names = [name for name in _IMAGE_FIELDS if value.get(name) is not None]
    if len(names) > 1:
        raise bad_request(f"{names[0]} and {names[1]}: give one of them", names[1])
    body = _validated({n: v for n, v in value.items() if n not in _IMAGE_FIELDS})
    [name] = names or ["images"]
    entries = value.get(name)
    items: list[Any] = [] if entries is None else [entries]
    if isinstance(entries, list):
        items = entries
    reader = _input_images(len(items), context)
    images = []
    for index, item in enumerate(items):
        with blame(name if items is not entries else f"{name}.{index}"):
            images.append(await reader.read_url(_url_of(item)))
    return body, tuple(images)


def _input_images(count: int, context: Context) -> RequestImages:
    if not count:
        raise bad_request(
            "image: at least one is needed: a file in a form, or in JSON "
            '"images": [{"image_url": "data:image/png;base64,…"}]',
            "image",
        )
    return context.input_images(count, "image")


def _url_of(item: Any) -> str:
    """The URL in an entry of `images`: a string, or one in the objects that clients write."""
    for key in ("image_url", "url"):
        if isinstance(item, dict) and item.get(key) is not None:
            item = item[key]
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and item.get("file_id") is not None:
        raise ImageError("file_id: this server keeps no files; send the image as a data URL")
    raise ImageError("an image is a URL, or an object with image_url")


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


def _fields(form: FormData) -> ImageBody:
    """The fields of a form without its images. A name that ends in [] is a list."""
    fields: dict[str, Any] = {}
    for name in form:
        values = form.getlist(name)
        if name in _IMAGE_FIELDS:
            continue
        if name.endswith("[]"):
            fields[name[:-2]] = values
        elif len(values) > 1:
            raise bad_request(f"{name[:80]}: given {len(values)} times", name[:80])
        else:
            fields[name] = values[0]
    return _validated(fields)


def _validated(fields: dict[str, Any]) -> ImageBody:
    try:
        return ImageBody.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError(
            [e | {"loc": ("body", *e["loc"])} for e in errors], body=fields
        ) from error
