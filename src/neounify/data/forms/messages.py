"""Messages with a role and content, as ms-swift, Hugging Face and OpenAI's API write them.

    {"messages": [{"role": "user", "content": "<image>Which colour?"},
                  {"role": "assistant", "content": "Red."}], "images": ["a.png"]}

Content is text with `<image>` and `<video>` marks, or a list of parts: `{"type": "text",
"text": …}`, `{"type": "image"}` and `{"type": "video"}`. An image part names its file itself
(`image`, `path`, `url` or `image_url`), has its number in the record's images (`index`), or is the
next of them; a video part likewise, with `video` or `video_url`. ms-swift's `loss` of a message
says whether it is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neounify.data.forms import Fields, has_value
from neounify.data.records import (
    CLIPS,
    IMAGES,
    MEDIA,
    ROLE_OF,
    Medium,
    RecordRules,
    segments,
)
from neounify.data.sample import DataError

_MESSAGE_FIELDS = ("role", "content", "loss")
_FILE_NAMES = ("path", "url")
_OWN_NAMES = {
    IMAGES.name: ("image", "image_url"),
    CLIPS.name: ("video", "video_url"),
}
"""Fields of a part that name its file, besides `_FILE_NAMES`."""
_PART_FIELDS = ("type", "text", "index", *_FILE_NAMES, *sum(_OWN_NAMES.values(), ()))
_TYPES = {
    **dict.fromkeys(("image", "image_url", "image_path"), IMAGES),
    **dict.fromkeys(("video", "video_url", "video_path"), CLIPS),
}
"""Types of parts that name an image or clip."""


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
    media = {medium.name: _Listed(record, medium) for medium in MEDIA}
    turns, losses = [], []
    for message in messages:
        role, content = _checked(message, rules)
        turns.append({"from": role, "value": "".join(_values(content, media, rules))})
        losses.append(_loss(message, role))
    record["conversations"] = turns
    for listed in media.values():
        if listed.named:
            record[listed.medium.name] = listed.in_order()
    if any(loss is False for loss in losses):
        record["loss"] = [
            [loss is None or loss] * len(segments(turn["value"]))
            if turn["from"] == "assistant"
            else [False] * len(segments(turn["value"]))
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


class _Listed:
    """Images or clips of a record: those of its list, and those that parts name themselves."""

    def __init__(self, record: Fields, medium: Medium) -> None:
        one, several = medium.fields
        listed = record.get(several, record.get(one))
        self.listed: list[Any] = [listed] if isinstance(listed, str) else listed or []
        self.record, self.medium = record, medium
        self.named: list[Any] = []

    def add(self, part: Mapping[str, Any]) -> None:
        """Note the image or clip of a part. Raises DataError."""
        noun = self.medium.noun
        names = (*_OWN_NAMES[self.medium.name], *_FILE_NAMES)
        named = [part[name] for name in names if has_value(part.get(name))]
        if len(named) > 1:
            raise DataError(f"a part names more than one {noun}")
        if named:
            file = named[0].get("url") if isinstance(named[0], Mapping) else named[0]
            if not isinstance(file, str):
                raise DataError(f"a part of the {noun}s does not name its file by a text")
            self.named.append(file.removeprefix("file://"))
            return
        index = part.get("index")
        number = len(self.named) if index is None else index
        if type(number) is not int or not 0 <= number < len(self.listed):
            raise DataError(
                f"{noun} part {len(self.named) + 1} stands for {noun} {number!r:.20} of the "
                f"record, which lists {len(self.listed)} (counted from 0)"
            )
        self.named.append(self.listed[number])

    def in_order(self) -> list[Any]:
        """The files of all parts. Raises DataError for listed ones that no part stands for."""
        left = [file for file in self.listed if file not in self.named]
        if left:
            raise DataError(
                f"{len(left)} {self.medium.noun}s of the record belong to no part of its messages"
            )
        for name in self.medium.fields:
            self.record.pop(name, None)
        return self.named


def _values(content: Any, media: Mapping[str, _Listed], rules: RecordRules) -> Iterator[str]:
    """The text of a message's content with marks of images and clips, piece by piece."""
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
        medium = _TYPES.get(kind) if isinstance(kind, str) else None
        if medium is not None:
            media[medium.name].add(part)
            yield medium.mark
        elif kind == "text" and isinstance(part.get("text"), str):
            for other in MEDIA:
                if other.mark in part["text"]:
                    raise DataError(
                        f"a text part contains {other.mark}; write a part of the type "
                        f'"{other.name}" there'
                    )
            yield part["text"]
        else:
            raise DataError(
                f"a part of a message has the type {kind!r:.80}; only text, images and clips can "
                "be trained on"
            )
