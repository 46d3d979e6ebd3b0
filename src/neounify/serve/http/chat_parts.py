"""What messages hold: text and images, in the spellings of many clients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from neounify.serve.http.text_fields import Text

# An image as Markdown: a data URL, or a result of a server such as this one. Other URLs stay
# text, as fetching them is nothing that an answer asks for. Space behind a URL is part of it: two
# repetitions of space in a row would take quadratic time.
_MARKDOWN_IMAGE = re.compile(
    r"!\[[^\[\]]{0,300}\]\(\s*(data:image/[^()]*|[^\s()]{0,500}/v1/results/[\w.-]{20,80}\s*)\)",
    re.ASCII | re.IGNORECASE,
)


class TextPart(BaseModel):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class InputImageUrl(BaseModel):
    """A data URL, a result of this server, or a URL of a host that the operator allows."""

    url: str


class ImagePart(BaseModel):
    """An image."""

    type: Literal["image_url"]
    image_url: InputImageUrl


class AnswerImage(BaseModel):
    """An image beside the text of an earlier answer, as this server gives it."""

    image_url: InputImageUrl
    text_offset: Annotated[int, Field(ge=0)] | None = None


def _canonical(part: Any) -> Any:
    """The part as OpenAI's chat has it, from the Responses API's and from other clients'."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if kind in ("image_url", "input_image", "image"):
        url = next((part[key] for key in ("image_url", "image", "url") if key in part), None)
        if url is None and part.get("file_id") is not None:
            raise ValueError("file_id: this server keeps no files; send the image as a data URL")
        return {"type": "image_url", "image_url": url if isinstance(url, dict) else {"url": url}}
    return part


Part = Annotated[TextPart | ImagePart, Field(discriminator="type"), BeforeValidator(_canonical)]


def text_part(text: str) -> TextPart:
    """A piece of text, however long."""
    return TextPart.model_construct(type="text", text=text)


def image_part(url: str) -> ImagePart:
    """An image by its URL."""
    return ImagePart(type="image_url", image_url=InputImageUrl(url=url))


def answer_parts(
    content: Sequence[TextPart | ImagePart], images: Sequence[AnswerImage]
) -> list[TextPart | ImagePart]:
    """The parts of an earlier answer, in each form in which it was given.

    Images beside a single text stand at their offsets, else behind it; images written in Markdown
    where they are written. A content that holds images of its own needs no others.
    """
    parts = list(content)
    if not any(isinstance(part, ImagePart) for part in parts):
        parts = _with_images("".join(p.text for p in parts if isinstance(p, TextPart)), images)
    return [piece for part in parts for piece in _unwritten(part)]


def _with_images(text: str, images: Sequence[AnswerImage]) -> list[TextPart | ImagePart]:
    parts: list[TextPart | ImagePart] = []
    begin = 0
    for image in sorted(images, key=lambda image: _offset(image, text)):
        end = _offset(image, text)
        parts += [text_part(text[begin:end]), image_part(image.image_url.url)]
        begin = end
    return [*parts, text_part(text[begin:])]


def _offset(image: AnswerImage, text: str) -> int:
    return len(text) if image.text_offset is None else min(image.text_offset, len(text))


def _unwritten(part: TextPart | ImagePart) -> Iterator[TextPart | ImagePart]:
    """A part with its images in Markdown apart from its text."""
    if isinstance(part, ImagePart):
        yield part
        return
    texts = _MARKDOWN_IMAGE.split(part.text)
    for place, piece in enumerate(texts):
        if place % 2:
            yield image_part(piece)
        elif piece:
            yield text_part(piece)
