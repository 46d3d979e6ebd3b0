"""Parts of messages as callers write them: texts, images, clips, tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neounify.errors import PromptError
from neounify.image.io import ImageSource
from neounify.tasks.clips import Frames
from neounify.text.tools import ToolCall


@dataclass(frozen=True)
class ImagePart:
    """An image of a message, which has not been read yet."""

    source: ImageSource


Part = str | ImagePart | Frames


def read_parts(turn: Mapping[str, Any]) -> tuple[Any, list[Part]]:
    """The role of a message, and its texts, images and clips in order; texts in a row are one.

    Raises PromptError.
    """
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise PromptError(f"a message needs 'role' and 'content', got {_short(turn)}")
    content = turn["content"]
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, str):
        return turn["role"], [content]
    if not isinstance(content, Sequence):
        raise PromptError(f"content must be a text or a list of parts, got {_short(content)}")
    parts: list[Part] = []
    for part in content:
        one, last = _read_part(part, turn["role"]), parts[-1] if parts else None
        if isinstance(one, str) and isinstance(last, str):
            parts[-1] = last + one  # a mark may begin in one text and end in the next
        else:
            parts.append(one)
    return turn["role"], parts


def _read_part(part: Any, role: Any) -> Part:
    if isinstance(part, Mapping):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "video" and isinstance(part.get("video"), Frames):
            if role != "user":
                raise PromptError(f"only user messages hold clips, this one is {role!r}")
            frames: Frames = part["video"]
            return frames
        if part.get("type") == "image" and "image" in part:
            if role not in ("user", "assistant"):
                raise PromptError(
                    f"only user and assistant messages hold images, this one is {role!r}"
                )
            return ImagePart(part["image"])
        if part.get("type") == "video":
            raise PromptError(
                "a content part of a clip must be {'type': 'video', 'video': Frames(…)}, of frames "
                "that are chosen already; give a file or a Video with video=, got "
                f"{_short(part)}"
            )
    raise PromptError(
        "a content part must be {'type': 'text', 'text': …}, {'type': 'image', 'image': …} or "
        f"{{'type': 'video', 'video': Frames(…)}}, got {_short(part)}"
    )


def read_tool_calls(turn: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """Tool calls of an assistant's message, in OpenAI's format or as ToolCall.

    Raises PromptError.
    """
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
