"""What a caller may write for a conversation, turned into messages with marks and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from neounify.errors import PromptError
from neounify.image.io import Source, read_image
from neounify.text.template import IMAGE_MARK, Message, place_images

Conversation = str | Sequence[Message | Mapping[str, Any]]


def read_pictures(
    images: Source | Sequence[Source], *, colour_profiles: bool = True
) -> list[PIL.Image.Image]:
    """One image or several, as `read_image` reads them; ImageError names what cannot be read."""
    several: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    return [read_image(image, colour_profiles=colour_profiles) for image in several]


def read_conversation(
    prompt: Conversation, images: Sequence[PIL.Image.Image], *, colour_profiles: bool = True
) -> tuple[list[Message], list[PIL.Image.Image]]:
    """Messages with one `<image>` mark per picture, and the pictures in that order.

    `prompt` is a question, or a list of messages {"role", "content"}; a content is a text
    with marks, or a list of {"type": "text", "text"} and {"type": "image", "image"} parts.
    Pictures of `images` fill the marks of texts in order; those left over go in front
    of the first user message.
    """
    turns = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    if not turns:
        raise PromptError("the list of messages is empty; the last one must be the user's")
    messages: list[Message] = []
    ordered: list[PIL.Image.Image] = []
    used = 0
    for turn in turns:
        role, pieces = _pieces(turn)
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                marks = piece.count(IMAGE_MARK) if role == "user" else 0
                ordered += images[used : used + marks]
                used += marks
                text += piece
            else:
                ordered.append(read_image(piece.source, colour_profiles=colour_profiles))
                text += IMAGE_MARK
        messages.append(Message(role, text))
    if used > len(images):
        raise PromptError(f"the text has {used} {IMAGE_MARK} marks for {len(images)} images")
    return _place_rest(messages, list(images[used:]), ordered)


class _Picture:
    def __init__(self, source: Source) -> None:
        self.source = source


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
    return messages, rest + ordered


def _pieces(turn: Message | Mapping[str, Any]) -> tuple[Any, list[str | _Picture]]:
    if isinstance(turn, Message):
        return turn.role, [turn.text]
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise PromptError(f"a message needs 'role' and 'content', got {_short(turn)}")
    content = turn["content"]
    if isinstance(content, str):
        return turn["role"], [content]
    if not isinstance(content, Sequence):
        raise PromptError(f"content must be a text or a list of parts, got {_short(content)}")
    return turn["role"], [_piece(part, turn["role"]) for part in content]


def _piece(part: Any, role: Any) -> str | _Picture:
    if isinstance(part, Mapping):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "image" and "image" in part:
            if role != "user":
                raise PromptError(f"only user messages hold images, this one is {role!r}")
            return _Picture(part["image"])
    raise PromptError(
        "a content part must be {'type': 'text', 'text': …} or {'type': 'image', 'image': …}, "
        f"got {_short(part)}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
