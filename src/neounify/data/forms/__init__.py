"""Forms of records that other tools write, each turned into a record of the published schema.

A form is a function from the fields of a record to those of the published schema; fields that it
does not know stay as they are, and reading refuses them by name. A new form is a function, a line
in `FORMS` and one in `KEYS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from neounify.data.formats import RECORD, named
from neounify.data.records import RecordRules
from neounify.data.sample import DataError

FORMS = {
    "conversations": "neounify.data.forms.messages:from_turns",
    "messages": "neounify.data.forms.messages:from_messages",
    "alpaca": "neounify.data.forms.instructions:from_alpaca",
    "query": "neounify.data.forms.instructions:from_query",
    "caption": "neounify.data.forms.captions:from_caption",
}
"""The function of every form, as "module:function"; imported when a record has the form."""

IMAGE_FIELDS = ("file_name", "image", "jpg", "jpeg", "png", "webp")
VIDEO_FIELDS = ("video", "mp4")
CAPTION_FIELDS = ("text", "caption", "prompt", "txt")

KEYS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "conversations": (("conversations",),),
    "messages": (("messages",),),
    "alpaca": (("instruction",), ("output",)),
    "query": (("query",), ("response",)),
    "caption": ((*IMAGE_FIELDS, *VIDEO_FIELDS, "url"), CAPTION_FIELDS),
}
"""Fields that tell a form, in order: one of every group has to be there."""

Fields = dict[str, Any]


def form_of(record: Mapping[str, Any]) -> str | None:
    """The form of a record by its fields; None for an unknown one."""
    for form, groups in KEYS.items():
        if all(any(key in record for key in group) for group in groups):
            return form
    return None


def published(fields: Fields, rules: RecordRules) -> Fields:
    """The fields of a record of any form in the published schema. Raises DataError."""
    form = form_of(fields)
    if rules.form is not None and form != rules.form:
        what = "of no known form" if form is None else f'of the form "{form}"'
        raise DataError(
            f'a record {what} (it has {named(fields)}), and the recipe says form = "{rules.form}"'
        )
    if form is None:
        raise DataError(
            f"a record of no known form (it has {named(fields)}). Known are {', '.join(FORMS)}, "
            f"such as {RECORD}"
        )
    rules.forms[form] += 1
    module, _, name = FORMS[form].partition(":")
    convert: Callable[[Fields, RecordRules], Fields] = getattr(import_module(module), name)
    return convert(fields, rules)


def has_value(value: Any) -> bool:
    """Whether a field says anything: tables give every record all fields."""
    return not (value is None or (isinstance(value, str | list | dict) and not value))
