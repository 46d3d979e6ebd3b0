"""The messages of a chat, their images decoded."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import PIL.Image

from neounify.serve.http.chat_parts import ImagePart, TextPart
from neounify.serve.http.chat_schema import ChatBody, ChatMessage
from neounify.serve.http.context import Context
from neounify.serve.http.errors import bad_request, blame
from neounify.serve.http.pictures import RequestImages
from neounify.serve.http.rendering import off_loop
from neounify.text.message import IMAGE_MARK
from neounify.text.tools import ToolCall

_HOLD_IMAGES = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message: texts and images in their order."""

    role: str
    pieces: list[str | PIL.Image.Image]
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The text with a mark in each image's place."""
        return "".join(p if isinstance(p, str) else IMAGE_MARK for p in self.pieces)

    @property
    def images(self) -> list[PIL.Image.Image]:
        return [p for p in self.pieces if isinstance(p, PIL.Image.Image)]

    def for_pipeline(self) -> dict[str, Any]:
        parts = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
            for p in self.pieces
        ]
        return {"role": self.role, "content": parts, "tool_calls": self.tool_calls}


async def read_turns(body: ChatBody, context: Context) -> list[Turn]:
    """The turns. Raises ApiError for images out of place, and for those that cannot be read."""
    parts = await off_loop(
        lambda: [_parts(message, place) for place, message in enumerate(body.messages)],
        body.text_size,
    )
    count = sum(isinstance(part, ImagePart) for own in parts for part in own)
    images = context.input_images(count, "messages")
    turns = []
    for place, (message, own) in enumerate(zip(body.messages, parts, strict=True)):
        with blame(f"messages.{place}.content"):
            pieces = [await _read_part(part, images) for part in own]
        role = "system" if message.role == "developer" else message.role
        calls = [call.function for call in message.tool_calls or ()]
        turns.append(
            Turn(
                role,
                _in_lines(pieces) if role == "user" else pieces,
                tuple(ToolCall(call.name, call.arguments) for call in calls),
            )
        )
    return turns


def _parts(message: ChatMessage, place: int) -> list[TextPart | ImagePart]:
    """The parts of a message. Raises ApiError for images in a role that holds none."""
    parts = message.parts
    if message.role not in _HOLD_IMAGES and any(isinstance(p, ImagePart) for p in parts):
        what = "result of a tool" if message.role == "tool" else f"{message.role} message"
        raise bad_request(
            f"messages.{place}.content: a {what} is text; put images into user messages",
            f"messages.{place}.content",
        )
    if message.images and message.role != "assistant":
        raise bad_request(
            f"messages.{place}.images: is for earlier answers; put images of a {message.role} "
            "message into its content",
            f"messages.{place}.images",
        )
    return parts


def _in_lines(pieces: list[str | PIL.Image.Image]) -> list[str | PIL.Image.Image]:
    """Images in front of a message each end their line, as in the prompts models learn from."""
    leading = list(itertools.takewhile(lambda p: not isinstance(p, str), pieces))
    rest = pieces[len(leading) :]
    if not rest:
        return pieces
    return [piece for image in leading for piece in (image, "\n")] + rest


async def _read_part(part: TextPart | ImagePart, images: RequestImages) -> str | PIL.Image.Image:
    if isinstance(part, TextPart):
        return part.text
    return await images.read_url(part.image_url.url)
