"""Fields of a record: the known ones, their other names, and errors about all others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from neounify.data.formats import foreign_record
from neounify.data.sample import DataError

FIELDS = ("conversations", "image", "images", "system", "task", "loss", "id")
TURN_FIELDS = ("from", "value")
MEDIA = ("video", "videos", "audio", "audios")


def checked_record(record: Any, ignored: Collection[str] = ()) -> dict[str, Any]:
    """A record of known fields: `images` is `image`, a `system` text is the first turn.

    Fields in `ignored`, and unknown ones without a value, are left out. Raises DataError for any
    other field, and for a record of another form.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record is a JSON {type(record).__name__}, not an object")
    fields = {key: value for key, value in record.items() if key not in ignored}
    conversations = fields.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        if "conversations" in fields:
            raise DataError('"conversations" must be a list of turns that is not empty')
        raise DataError(foreign_record(fields))
    for key, value in list(fields.items()):
        if key not in FIELDS:
            if value not in (None, "", [], {}):
                raise DataError(_unknown(key))
            del fields[key]
    _merge_images(fields)
    _merge_system(fields, conversations)
    for turn in conversations:
        if isinstance(turn, Mapping) and (extra := set(turn) - set(TURN_FIELDS) - set(ignored)):
            raise DataError(
                f'a turn has the unknown field "{min(extra, key=str)}"; it has "from" and "value"'
            )
    return fields


def _unknown(key: Any) -> str:
    name = str(key)[:40]
    if name in MEDIA:
        return f'the field "{name}": only images and text can be learnt from'
    close = get_close_matches(name, FIELDS, n=1)
    hint = f'; did you mean "{close[0]}"?' if close else f"; known are {', '.join(FIELDS)}"
    return f'unknown field "{name}"{hint} (fields not to be read: ignore = [...] in the recipe)'


def _merge_images(fields: dict[str, Any]) -> None:
    images = fields.pop("images", None)
    if images is None:
        return
    if fields.get("image") not in (None, images):
        raise DataError('a record has both "image" and "images"; give one of them')
    fields["image"] = images


def _merge_system(fields: dict[str, Any], conversations: list[Any]) -> None:
    system = fields.pop("system", None)
    if not system:
        return
    if not isinstance(system, str):
        raise DataError(f'"system" is {type(system).__name__}, not text')
    if isinstance(conversations[0], Mapping) and conversations[0].get("from") == "system":
        raise DataError('a record has "system" and a system turn; give one of them')
    fields["conversations"] = [{"from": "system", "value": system}, *conversations]
    if isinstance(fields.get("loss"), list):
        fields["loss"] = [[False], *fields["loss"]]
