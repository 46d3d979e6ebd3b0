"""Messages with a role and content, as ms-swift, Hugging Face and OpenAI's API write them.

    {"messages": [{"role": "user", "content": "<image>Which colour?"},
                  {"role": "assistant", "content": "Red."}], "images": ["a.png"]}

Content is text with `<image>` marks, or a list of parts `{"type": "text", "text": …}` and
`{"type": "image"}`. An image part names its file itself (`image`, `path`, `url` or `image_url`),
has its number in the record's images (`index`), or is the next of them. ms-swift's `loss` of a
message says whether it is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from neounify.data.forms import Fields, has_value
from neounify.data.sample import ROLE_OF, DataError, RecordRules
from neounify.text import IMAGE_MARK

_MESSAGE_FIELDS = ("role", "content", "loss")
_PART_FIELDS = ("type", "text", "image", "path", "url", "image_url", "index")
_IMAGE_NAMES = ("image", "path", "url", "image_url")
_ANY_IMAGE = ("image", "image_url", "image_path")
"""Types of image parts."""


def from_turns(fields: Fields, rules: RecordRules) -> Fields:
    """`conversations` of messages; turns with "from" and "value" stay as they are."""
    turns = fields.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        if has_value(fields.get("messages")):
            raise DataError('a record has both "messages" and "conversations"; ignore one of them')
        return from_messages({**fields, "messages": turns}, rules)
    return fields


def from_messages(fields: Fields, rules: RecordRules) -> Fields:
    """The published record of one with "messages". Raises DataError."""
    record = dict(fields)
    messages = record.pop("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError('"messages" must be a list of messages that is not empty')
    images = _Images(record)
    turns, losses = [], []
    for message in messages:
        role, content = _checked(message, rules)
        turns.append({"from": role, "value": "".join(_values(content, images, rules))})
        losses.append(_loss(message, role))
    record["conversations"] = turns
    if images.named:
        record["image"] = images.in_order()
    if any(loss is False for loss in losses):
        record["loss"] = [
            [loss is None or loss] * _parts(turn["value"])
            if turn["from"] == "assistant"
            else [False] * _parts(turn["value"])
            for turn, loss in zip(turns, losses, strict=True)
        ]
    return record


def _checked(message: Any, rules: RecordRules) -> tuple[str, Any]:
    """Role and content of a message without unknown fields."""
    if not isinstance(message, Mapping):
        raise DataError(f'one of "messages" is a {type(message).__name__}, not an object')
    for key, value in message.items():
        if key not in (*_MESSAGE_FIELDS, *rules.ignored) and has_value(value):
            raise DataError(
                f'a message has the unknown field "{str(key)[:40]}"; known are '
                f"{', '.join(_MESSAGE_FIELDS)} (fields not to be read: ignore = [...])"
            )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLE_OF:
        raise DataError(f"a message has the role {role!r:.80}; known are {', '.join(ROLE_OF)}")
    return ROLE_OF[role], message.get("content")


def _loss(message: Mapping[str, Any], role: str) -> bool | None:
    loss = message.get("loss")
    if loss is None:
        return None
    if loss not in (True, False):  # 1 and 0 too
        raise DataError(f'"loss" of a message must be true or false, got {loss!r:.80}')
    if loss and role != "assistant":
        raise DataError(f"a {role} message has a loss; only assistant messages can be trained on")
    return bool(loss)


def _parts(value: str) -> int:
    """Parts of text and images in a turn's value."""
    return len([s for s in re.split(f"({re.escape(IMAGE_MARK)})", value) if s])


class _Images:
    """Images of a record: those of its list, and those that parts name themselves."""

    def __init__(self, record: Fields) -> None:
        self.listed = record.get("images", record.get("image"))
        self.record = record
        self.named: list[Any] = []
        self._from_list = False

    def add(self, part: Mapping[str, Any]) -> None:
        """Note the image of a part. Raises DataError."""
        named = [part[name] for name in _IMAGE_NAMES if has_value(part.get(name))]
        if len(named) > 1:
            raise DataError("an image part names more than one image")
        if named:
            image = named[0].get("url") if isinstance(named[0], Mapping) else named[0]
            if not isinstance(image, str):
                raise DataError("an image part does not name its file by a text")
            self.named.append(image.removeprefix("file://"))
            return
        listed = [self.listed] if isinstance(self.listed, str) else self.listed or []
        index = part.get("index")
        number = len(self.named) if index is None else index
        if type(number) is not int or not 0 <= number < len(listed):
            raise DataError(
                f"image part {len(self.named) + 1} stands for image {number!r:.20} of the record, "
                f"which lists {len(listed)} (counted from 0)"
            )
        self._from_list = True
        self.named.append(listed[number])

    def in_order(self) -> list[Any]:
        """The images of all parts. Raises DataError for listed ones that no part stands for."""
        listed = [self.listed] if isinstance(self.listed, str) else self.listed or []
        left = [image for image in listed if image not in self.named]
        if left:
            raise DataError(f"{len(left)} images of the record belong to no part of its messages")
        for name in ("image", "images"):
            self.record.pop(name, None)
        return self.named


def _values(content: Any, images: _Images, rules: RecordRules) -> Iterator[str]:
    """The text of a message's content with `<image>` marks, piece by piece."""
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise DataError(f'"content" of a message is {type(content).__name__}, not text or parts')
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise DataError(f"a part of a message is a {type(part).__name__}, not an object")
        for key, value in part.items():
            if key not in (*_PART_FIELDS, *rules.ignored) and has_value(value):
                raise DataError(f'a part of a message has the unknown field "{str(key)[:40]}"')
        kind = part.get("type")
        if kind in _ANY_IMAGE:
            images.add(part)
            yield IMAGE_MARK
        elif kind == "text" and isinstance(part.get("text"), str):
            if IMAGE_MARK in part["text"]:
                raise DataError(f"a text part contains {IMAGE_MARK}; write an image part there")
            yield part["text"]
        else:
            raise DataError(
                f"a part of a message has the type {kind!r:.80}; only text and images can be "
                "trained on"
            )
