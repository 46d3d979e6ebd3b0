"""Normalises chat input into messages with image placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from neounify.errors import PromptError
from neounify.image.io import ImageSource, read_image
from neounify.text.message import IMAGE_MARK, Message
from neounify.text.template import place_images
from neounify.text.tools import ToolCall

Conversation = str | Sequence[Message | Mapping[str, Any]]


def read_images(
    images: ImageSource | Sequence[ImageSource], *, colour_profiles: bool = True
) -> list[PIL.Image.Image]:
    """One image or several, as `read_image` reads them; ImageError names what cannot be read."""
    several: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    return [read_image(image, colour_profiles=colour_profiles) for image in several]


def read_conversation(
    prompt: Conversation, images: Sequence[PIL.Image.Image], *, colour_profiles: bool = True
) -> tuple[list[Message], list[PIL.Image.Image]]:
    """Messages with a placeholder for each image, and the images in that order.

    `prompt` is a question, or a list of messages {"role", "content"}; a content is a text,
    where a user's has marks, or a list of {"type": "text", "text"} and {"type": "image",
    "image"} parts. Images of `images` fill the marks of texts in order; those left over go
    in front of the first user message. Raises PromptError, and ImageError for parts that
    hold no image.
    """
    if isinstance(prompt, str):
        if not prompt.strip() and not images:
            raise PromptError("a prompt is needed: the text is empty and there is no image")
        prompt = [Message("user", prompt)]
    if not prompt:
        raise PromptError("the list of messages is empty")
    messages: list[Message] = []
    ordered: list[PIL.Image.Image] = []
    used = 0
    for turn in prompt:
        if isinstance(turn, Message):
            messages.append(turn)
            marks, turn_images = turn.n_images, list(images[used : used + turn.n_images])
        else:
            message, marks, turn_images = _read_message(turn, images[used:], colour_profiles)
            messages.append(message)
        used += marks
        ordered += turn_images
    if used > len(images):
        raise PromptError(f"the text has {used} {IMAGE_MARK} marks for {len(images)} images")
    return _place_rest(messages, list(images[used:]), ordered)


def read_request(
    prompt: Conversation, images: Sequence[PIL.Image.Image], *, colour_profiles: bool = True
) -> tuple[str, list[Message], list[PIL.Image.Image]]:
    """Prompt text, earlier turns, and all images in order, of an interleaved answer.

    Images of a plain text that have no mark are placed when the prompt is built, numbered.
    Raises PromptError unless the last message is a user's.
    """
    if isinstance(prompt, str):
        return prompt, [], list(images)
    messages, ordered = read_conversation(prompt, images, colour_profiles=colour_profiles)
    *history, last = messages
    if last.role != "user":
        raise PromptError(
            f"an answer with images needs a user's message last, this one is {last.role!r}"
        )
    return last.text, history, ordered


class _ImageRef:
    def __init__(self, source: ImageSource) -> None:
        self.source = source


def _read_message(
    turn: Mapping[str, Any], images: Sequence[PIL.Image.Image], colour_profiles: bool
) -> tuple[Message, int, list[PIL.Image.Image]]:
    """The message, the number of `images` its marks take, and all its images in order."""
    role, pieces = _pieces(turn)
    text, offsets, used = "", [], 0
    turn_images: list[PIL.Image.Image] = []
    for piece in pieces:
        if isinstance(piece, str):
            marks = piece.count(IMAGE_MARK) if role == "user" else 0
            turn_images += images[used : used + marks]
            used += marks
            text += piece
        else:
            turn_images.append(read_image(piece.source, colour_profiles=colour_profiles))
            if role == "user":
                text += IMAGE_MARK
            else:
                offsets.append(len(text))
    message = Message(role, text, image_offsets=tuple(offsets), tool_calls=_tool_calls(turn))
    return message, used, turn_images


def _place_rest(
    messages: list[Message], rest: list[PIL.Image.Image], ordered: list[PIL.Image.Image]
) -> tuple[list[Message], list[PIL.Image.Image]]:
    if not rest:
        return messages, ordered
    first = next((n for n, m in enumerate(messages) if m.role == "user"), None)
    if first is None:
        raise PromptError("there are images but no user message to show them in")
    text = messages[first].text
    total = text.count(IMAGE_MARK) + len(rest)
    messages[first] = Message("user", place_images(text, total, numbered=False))
    before = sum(message.n_images for message in messages[:first])
    return messages, ordered[:before] + rest + ordered[before:]


def _pieces(turn: Mapping[str, Any]) -> tuple[Any, list[str | _ImageRef]]:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise PromptError(f"a message needs 'role' and 'content', got {_short(turn)}")
    content = turn["content"]
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, str):
        return turn["role"], [content]
    if not isinstance(content, Sequence):
        raise PromptError(f"content must be a text or a list of parts, got {_short(content)}")
    return turn["role"], [_piece(part, turn["role"]) for part in content]


def _piece(part: Any, role: Any) -> str | _ImageRef:
    if isinstance(part, Mapping):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "image" and "image" in part:
            if role not in ("user", "assistant"):
                raise PromptError(
                    f"only user and assistant messages hold images, this one is {role!r}"
                )
            return _ImageRef(part["image"])
    raise PromptError(
        "a content part must be {'type': 'text', 'text': …} or {'type': 'image', 'image': …}, "
        f"got {_short(part)}"
    )


def _tool_calls(turn: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """Tool calls of an assistant's message, in OpenAI's format or as ToolCall."""
    return tuple(map(_tool_call, turn.get("tool_calls") or ()))


def _tool_call(call: Any) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, Mapping):
        name, arguments = function.get("name"), function.get("arguments", "{}")
        if isinstance(name, str) and isinstance(arguments, str):
            return ToolCall(name, arguments)
    raise PromptError(
        "a tool call must be {'function': {'name': …, 'arguments': JSON text}}, "
        f"got {_short(call)}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
