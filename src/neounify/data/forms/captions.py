"""Images and clips with a caption: rows of metadata.jsonl and metadata.csv, and of tables.

    {"file_name": "a.png", "text": "a red wall"}
    {"file_name": "a.mp4", "text": "a star moves left"}

The image or clip is the target of its caption. Other fields describe it and are left out, which the
source reports once; those that make the record another task are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from neounify.data.formats import VIDEO_ENDINGS, has_ending
from neounify.data.forms import CAPTION_FIELDS, IMAGE_FIELDS, VIDEO_FIELDS, Fields, has_value
from neounify.data.records import CLIPS, FIELDS, IMAGES, MARKS, SOUND, RecordRules
from neounify.data.sample import (
    ClipFile,
    DataError,
    Part,
    Sample,
    SampleImage,
    SampleText,
    Turn,
)

OTHER_TASK = (
    *SOUND,
    *("negative_prompt", "mask", "mask_image", "edit_image", "source_image", "input_image"),
    *("conditioning_image", "control_image", "original_image", "edited_image", "chosen"),
    *("rejected", "question", "answer", "response", "additional_file_name", "file_names"),
)
"""Fields that make an image with a text more than an image and its caption."""
MEDIA_FIELDS = (*IMAGE_FIELDS, *VIDEO_FIELDS)
KEPT = ("id", "task")
MAX_UNREAD = 100
"""Names of fields that a source remembers to report."""


def from_caption(fields: Fields, rules: RecordRules) -> Fields:
    """The published record of an image or clip with its caption. Raises DataError."""
    name, media = _only(fields, MEDIA_FIELDS, "image or clip")
    _, caption = _only(fields, CAPTION_FIELDS, "caption")
    text = checked_caption(caption)
    _leave_out(fields, (*MEDIA_FIELDS, *CAPTION_FIELDS, *KEPT), rules)
    is_clip = name in VIDEO_FIELDS or (isinstance(media, str) and has_ending(media, VIDEO_ENDINGS))
    medium = CLIPS if is_clip else IMAGES
    record = {name: fields[name] for name in KEPT if has_value(fields.get(name))}
    return (
        {"id": fields.get("key"), medium.name: media}
        | record
        | {
            "conversations": [
                {"from": "human", "value": text},
                {"from": "gpt", "value": medium.mark},
            ]
        }
    )


def caption_sample(file: Path, text: bytes | None, metadata: Any, rules: RecordRules) -> Sample:
    """An image or clip as the target of its caption: `text`, or the "caption" of its metadata.

    Raises DataError for a caption that is not there or not text.
    """
    rules.forms["caption"] += 1
    fields = metadata if isinstance(metadata, Mapping) else {}
    caption = fields.get("caption")
    if text is not None:
        try:
            caption = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the caption is not UTF-8 text ({error.reason}); convert it"
            ) from error
    prompt = SampleText(checked_caption(caption))
    _leave_out(fields, (*MEDIA_FIELDS, *CAPTION_FIELDS, *rules.ignored), rules)
    is_clip = has_ending(file.name, VIDEO_ENDINGS)
    target: Part = SampleImage(file, "target")
    if is_clip:
        target = ClipFile(file, "target", rules.clips, file.name)
    turns = Turn("user", (prompt,)), Turn("assistant", (target,))
    return Sample("t2v" if is_clip else "t2i", turns)


def checked_caption(caption: Any) -> str:
    """A caption without blanks around it. Raises DataError."""
    if not isinstance(caption, str):
        if caption is None:
            raise DataError("there is no caption")
        raise DataError(f"the caption is {type(caption).__name__}, not text")
    if not caption.strip():
        raise DataError("the caption is empty")
    if mark := MARKS.search(caption):
        raise DataError(f"the caption contains {mark[0]}")
    return caption.strip()


def _leave_out(fields: Mapping[str, Any], known: Collection[str], rules: RecordRules) -> None:
    """Note fields that are not read. Raises DataError for those that mean another task."""
    for name, value in fields.items():
        if name in known or not has_value(value):
            continue
        if name in OTHER_TASK or name in FIELDS or str(name).endswith("_file_name"):
            raise DataError(
                f'an image or clip with a caption and the field "{str(name)[:40]}" is another task '
                "than generating it; write it as conversations, or list the field in ignore = [...]"
            )
        if len(rules.unread) < MAX_UNREAD:
            rules.unread.add(str(name)[:40])


def _only(fields: Fields, names: tuple[str, ...], what: str) -> tuple[str, Any]:
    """The one field among `names` that has a value, and that value."""
    there = [name for name in names if has_value(fields.get(name))]
    if len(there) > 1:
        listed = " and ".join(f'"{name}"' for name in there)
        raise DataError(f"{listed} may both be the {what}; list all but one in ignore = [...]")
    if there:
        return there[0], fields[there[0]]
    status = fields.get("status")
    failed = f" (status {status!r:.60})" if isinstance(status, str) and what != "caption" else ""
    raise DataError(f"there is no {what}{failed}")
