"""Images with a caption: rows of metadata.jsonl and metadata.csv, and of tables with images.

    {"file_name": "a.png", "text": "a red wall"}

The image is the target of its caption. Other fields describe the image and are left out, which the
source reports once; those that make the record another task are refused.
"""

from __future__ import annotations

from typing import Any

from neounify.data.forms import CAPTION_FIELDS, IMAGE_FIELDS, Fields, has_value
from neounify.data.sample import FIELDS, MEDIA, DataError, RecordRules
from neounify.text import IMAGE_MARK

OTHER_TASK = (
    *MEDIA,
    *("negative_prompt", "mask", "mask_image", "edit_image", "source_image", "input_image"),
    *("conditioning_image", "control_image", "original_image", "edited_image", "chosen"),
    *("rejected", "question", "answer", "response", "additional_file_name", "file_names"),
)
"""Fields that make an image with a text more than an image and its caption."""
KEPT = ("id", "task")
MAX_UNREAD = 100
"""Names of fields that a source remembers to report."""


def from_caption(fields: Fields, rules: RecordRules) -> Fields:
    """The published record of an image with its caption. Raises DataError."""
    image = _only(fields, IMAGE_FIELDS, "image")
    caption = _only(fields, CAPTION_FIELDS, "caption")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError("the caption is empty" if caption == "" else "the caption is not text")
    if IMAGE_MARK in caption:
        raise DataError(f"the caption contains {IMAGE_MARK}")
    for name, value in fields.items():
        if name in (*IMAGE_FIELDS, *CAPTION_FIELDS, *KEPT) or not has_value(value):
            continue
        if name in OTHER_TASK or name in FIELDS or name.endswith("_file_name"):
            raise DataError(
                f'an image with a caption and the field "{name[:40]}" is another task than '
                "text to image; write it as conversations, or list the field in ignore = [...]"
            )
        if len(rules.unread) < MAX_UNREAD:
            rules.unread.add(name[:40])
    record = {name: fields[name] for name in KEPT if has_value(fields.get(name))}
    return (
        {"id": fields.get("key"), "image": image}
        | record
        | {
            "conversations": [
                {"from": "human", "value": caption.strip()},
                {"from": "gpt", "value": IMAGE_MARK},
            ]
        }
    )


def _only(fields: Fields, names: tuple[str, ...], what: str) -> Any:
    """The value of the one field among `names` that has one."""
    there = [name for name in names if has_value(fields.get(name))]
    if len(there) > 1:
        listed = " and ".join(f'"{name}"' for name in there)
        raise DataError(f"{listed} may both be the {what}; list all but one in ignore = [...]")
    if there:
        return fields[there[0]]
    status = fields.get("status")
    failed = f" (status {status!r:.60})" if isinstance(status, str) and what == "image" else ""
    raise DataError(f"there is no {what}{failed}")
