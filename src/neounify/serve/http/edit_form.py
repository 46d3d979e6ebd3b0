"""The multipart form of an edit: fields to validate, and pictures to decode."""

from __future__ import annotations

from typing import Any

import PIL.Image
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from neounify.serve.http.context import Context
from neounify.serve.http.errors import bad_request, blame
from neounify.serve.http.image_schema import ImageBody
from neounify.serve.http.pictures import read_picture
from neounify.serve.http.settings import MEBIBYTE

_MAX_FIELDS = 64
_IMAGE_FIELDS = ("image", "image[]")


async def read_edit(
    request: Request, context: Context
) -> tuple[ImageBody, tuple[PIL.Image.Image, ...]]:
    """The fields and the pictures, in order. Raises ApiError, RequestValidationError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise bad_request("An edit is sent as multipart/form-data, its pictures as files.")
    limits = context.settings.limits
    form = await request.form(
        max_files=limits.images + 1, max_fields=_MAX_FIELDS, max_part_size=4 * MEBIBYTE
    )
    async with _closing(form):
        body = _fields(form)
        uploads = [f for name in _IMAGE_FIELDS for f in form.getlist(name)]
        if not uploads or not all(isinstance(f, UploadFile) for f in uploads):
            raise bad_request("image: at least one picture is needed, sent as a file", "image")
        if len(uploads) > limits.images:
            raise bad_request(
                f"{len(uploads)} images in one request; at most {limits.images} are read", "image"
            )
        pictures = []
        for upload in uploads:
            assert isinstance(upload, UploadFile)
            with blame("image"):
                pictures.append(await read_picture(await upload.read(), context.settings))
    return body, tuple(pictures)


def edit_form_schema() -> dict[str, Any]:
    """The form for OpenAPI, which FastAPI does not see."""
    schema = ImageBody.model_json_schema()
    picture = {"type": "string", "format": "binary", "contentMediaType": "image/*"}
    schema["properties"] |= {
        "image": {
            "description": "The pictures to edit, in order; also accepted as `image[]`.",
            "type": "array",
            "items": picture,
            "minItems": 1,
        }
    }
    schema["required"] = [*schema["required"], "image"]
    schema["title"] = "EditForm"
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _fields(form: FormData) -> ImageBody:
    """Every field but the pictures. A name that ends in [] is a list."""
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
    try:
        return ImageBody.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError(
            [e | {"loc": ("body", *e["loc"])} for e in found], body=fields
        ) from error


class _closing:
    """Closes the temporary files of a form."""

    def __init__(self, form: FormData) -> None:
        self._form = form

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        await self._form.close()
