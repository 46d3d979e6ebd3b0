"""Training samples, and the published JSON schema of their records.

A `Sample` is what every source of data yields: turns of text and image parts, each with its loss
flag. A thought is literal text of the assistant turn, `<think>\\n…\\n</think>\\n\\n`; the empty
thought before an answer without one belongs to the chat template and is not part of a sample.

    {"conversations": [{"from": "human", "value": "<image>\\nMake it red."},
                       {"from": "gpt", "value": "<image>"}],
     "image": ["source.png", "target.png"]}

is a record: `<image>` marks stand for the paths in order. An image in a human turn is an input, one
in a gpt turn is a target. Only gpt turns carry a text loss. "images" is another name for "image";
"system" is the text of a system turn. Two further keys are optional: "task", and "loss" (per turn,
per part) where it differs from that rule. Other fields are refused.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.errors import NeounifyError
from neounify.files import is_unicode
from neounify.text import IMAGE_MARK, Role
from neounify.text.clips import VIDEO_MARK

THINK_OPEN, THINK_CLOSE = "<think>\n", "\n</think>\n\n"
TASKS = (
    *("t2i", "t2i_think", "vqa", "caption", "edit", "edit_think", "interleave", "text"),
    *("t2v", "video_qa", "video_caption", "next_frames"),
)
"""Of text and images and, last, of clips: from text, questions, captions, next frames."""

ImageLike = Image.Image | NDArray[np.uint8] | Path

SPEAKER_OF: dict[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}

PUBLISHED = "conversations"
"""The form of records in the published schema."""
FIELDS = ("conversations", "image", "images", "system", "task", "loss", "id")
TURN_FIELDS = ("from", "value")
MEDIA = ("video", "videos", "audio", "audios")

ROLE_OF: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}

MAX_ID_CHARS = 200
MAX_IMAGES = 1000
"""Images of one record; each is read before the tokens of a sample are counted."""

# Task names of published data files.
TASK_ALIASES = {
    "mm_t2i": "t2i",
    "it2i": "edit",
    "mm_it2i": "edit",
    "interleave_gen": "interleave",
    "mm_interleave_gen": "interleave",
    "mm_interleaved": "vqa",
    "multimodal": "vqa",
}


class DataError(NeounifyError, ValueError):
    """A training sample, a data file or a scene setting is damaged or inconsistent.

    `reason` is the message without what differs from sample to sample, to count by.
    """

    def __init__(self, message: str = "", reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class SampleText:
    """Text; `loss`: whether its tokens carry the text loss."""

    text: str
    loss: bool = False

    def __post_init__(self) -> None:
        if not self.text:
            raise DataError("a text part is empty; leave it out")
        if IMAGE_MARK in self.text:
            raise DataError(f"a text part contains {IMAGE_MARK!r}; use a SampleImage there")
        if not is_unicode(self.text):
            raise DataError("a text has half a character (half a surrogate pair)")


@dataclass(frozen=True, eq=False)
class SampleImage:
    """An image: uint8 RGB array [height, width, 3], an RGB PIL image, or the path of a file.

    `role` "input" is for understanding only; a "target" carries the image loss.
    """

    image: ImageLike
    role: Literal["input", "target"]

    def __post_init__(self) -> None:
        if self.role not in ("input", "target"):
            raise DataError(f"the role of an image is {self.role!r}, not 'input' or 'target'")
        if isinstance(self.image, np.ndarray):
            shape, dtype = self.image.shape, self.image.dtype
            if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
                raise DataError(f"an image array is {dtype} {list(shape)}, not uint8 [h, w, 3]")
        elif isinstance(self.image, Image.Image):
            if self.image.mode != "RGB":
                raise DataError(f"an image has mode {self.image.mode}; convert it to RGB first")
        elif not isinstance(self.image, Path):
            raise DataError(f"an image is a {type(self.image).__name__}, not an array, PIL or Path")

    @property
    def loss(self) -> bool:
        """Whether the image carries the image loss."""
        return self.role == "target"

    def pixels(self) -> NDArray[np.uint8]:
        """The image as uint8 [height, width, 3]. Raises DataError for a path that was not read."""
        if isinstance(self.image, Path):
            raise DataError(f"the image {self.image} has not been read yet")
        return np.asarray(self.image)


@dataclass(frozen=True, eq=False)
class SampleClip:
    """A clip: uint8 RGB frames [frames, height, width, 3], or images of one size; and their rate.

    `role` "input" is for understanding only; a "target" carries the image loss. With `tubes` an
    input is seen in tubes of several frames, whose last one is filled with its last frame, else
    as so many images. Its text has the time of each tube or image in front of it.
    """

    frames: NDArray[np.uint8] | Sequence[ImageLike]
    role: Literal["input", "target"]
    fps: float = 24.0
    tubes: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise DataError(f"a clip has {self.fps} frames per second, not a number above 0")
        if isinstance(self.frames, np.ndarray) and self.frames.ndim != 4:
            raise DataError(f"a clip is {list(self.frames.shape)}, not [frames, height, width, 3]")
        if not len(self.frames):
            raise DataError("a clip has no frames")
        images = [SampleImage(frame, self.role) for frame in self.frames]
        if not isinstance(self.frames, np.ndarray):
            sizes = {image.pixels().shape for image in images}
            if len(sizes) > 1:
                raise DataError(f"the frames of a clip have several sizes: {sorted(sizes)}")

    @property
    def loss(self) -> bool:
        """Whether the clip carries the image loss."""
        return self.role == "target"

    def pixels(self) -> NDArray[np.uint8]:
        """The frames as uint8 [frames, height, width, 3]."""
        return np.stack([np.asarray(frame) for frame in self.frames])


Part = SampleText | SampleImage | SampleClip


@dataclass(frozen=True)
class Turn:
    """The parts of one speaker, in order."""

    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in SPEAKER_OF:
            raise DataError(f"a turn has the role {self.role!r}, not one of {list(SPEAKER_OF)}")
        if self.role != "assistant" and any(part.loss for part in self.parts):
            raise DataError(f"a {self.role} turn carries a loss; only assistant turns may")

    @property
    def value(self) -> str:
        """Its text, with `<image>` in place of each image and `<video>` of each clip."""
        return "".join(_value(part) for part in self.parts)


def _value(part: Part) -> str:
    if isinstance(part, SampleText):
        return part.text
    return IMAGE_MARK if isinstance(part, SampleImage) else VIDEO_MARK


@dataclass(frozen=True)
class Sample:
    """One training document: an optional system turn, then user and assistant alternating."""

    task: str
    turns: tuple[Turn, ...]
    id: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"the task {self.task[:80]!r} is unknown; tasks are {', '.join(TASKS)}")
        roles = [turn.role for turn in self.turns]
        talk = roles[1:] if roles[:1] == ["system"] else roles
        if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
            raise DataError(
                "turns must be an optional system turn, then user and assistant alternating: "
                f"{roles}"
            )
        if not any(part.loss for turn in self.turns for part in turn.parts):
            raise DataError("the sample has nothing to train on: no part carries a loss")

    @property
    def images(self) -> tuple[SampleImage, ...]:
        """All images, in order."""
        return tuple(p for turn in self.turns for p in turn.parts if isinstance(p, SampleImage))

    @property
    def clips(self) -> tuple[SampleClip, ...]:
        """All clips, in order."""
        return tuple(p for turn in self.turns for p in turn.parts if isinstance(p, SampleClip))

    def text(self, role: Role | None = None) -> str:
        """The text of all turns, or of one role's, with a mark in place of each image and clip."""
        chosen = [turn for turn in self.turns if role in (None, turn.role)]
        return "\n".join(turn.value for turn in chosen)


def sample_to_record(sample: Sample, image_paths: Sequence[str]) -> dict[str, Any]:
    """The sample in the published schema; `image_paths`: one per image, in order."""
    if len(image_paths) != len(sample.images):
        raise DataError(f"{len(sample.images)} images, but {len(image_paths)} paths")
    if sample.clips:
        raise DataError("a sample with a clip has no record: records name images, not clips")
    record: dict[str, Any] = {
        "conversations": [
            {"from": SPEAKER_OF[turn.role], "value": turn.value} for turn in sample.turns
        ],
        "image": list(image_paths),
        "task": sample.task,
    }
    if sample.id:
        record["id"] = sample.id
    flags = [_segment_flags(turn) for turn in sample.turns]
    default = [
        [turn.role == "assistant"] * len(row) for turn, row in zip(sample.turns, flags, strict=True)
    ]
    if flags != default:
        record["loss"] = flags
    return record


@dataclass(frozen=True)
class RecordRules:
    """Rules of a source for its records.

    `task` overrides that of records; `form` is the only one of `FORMS` they may have, None for
    any; fields named in `ignored` are not read. `described` renames fields as a description beside
    the data says. Of the records that this process reads, fields that were left out because they
    cannot change a sample are added to `unread`, and `forms` are counted.
    """

    task: str | None = None
    form: str | None = None
    ignored: tuple[str, ...] = ()
    described: Callable[[dict[str, Any], RecordRules], dict[str, Any]] | None = None
    unread: set[str] = field(default_factory=set)
    forms: Counter[str] = field(default_factory=Counter)


def sample_from_record(
    record: Any,
    folder: Path,
    rules: RecordRules | None = None,
    blobs: dict[str, bytes] | None = None,
) -> Sample:
    """Read one JSON object of the published schema, or of another of `FORMS`.

    Images stay paths below `folder`; contents that a record holds as data URLs go into `blobs` by
    the name of their path. Without a "task", it is inferred. Raises DataError, also for unknown
    fields.
    """
    rules = rules or RecordRules()
    record = checked_record(record, rules)
    conversations = record["conversations"]
    paths = _image_paths(record.get("image"), {} if blobs is None else blobs)
    flags = record.get("loss")
    if flags is not None and (not isinstance(flags, list) or len(flags) != len(conversations)):
        raise DataError('"loss" must be a list with one list of flags per turn')
    values = [_speaker_and_value(entry) for entry in conversations]
    marks = sum(value.count(IMAGE_MARK) for _, value in values)
    if marks < len(paths):
        values = _with_leading_marks(values, len(paths) - marks)
    elif marks > len(paths):
        raise DataError(f"{marks} {IMAGE_MARK} marks, but {len(paths)} images")
    remaining = iter(folder / path for path in paths)
    turns = tuple(
        _read_turn(role, value, remaining, None if flags is None else flags[index])
        for index, (role, value) in enumerate(values)
    )
    chosen = rules.task or record.get("task")
    if chosen is None:
        chosen = _infer_task(turns)
    if not isinstance(chosen, str):
        raise DataError(f'"task" is {chosen!r:.80}, not a string')
    identity = record.get("id")
    name = "" if identity is None else str(identity)[:MAX_ID_CHARS]
    return Sample(TASK_ALIASES.get(chosen, chosen), turns, name)


def parse_record(content: bytes) -> Any:
    """JSON in UTF-8, with or without a mark in front. Raises DataError for any other text."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text (byte 0x{content[error.start]:02x} at {error.start}); convert it "
            "(iconv -t UTF-8, with -f and what it is in now)"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error


def checked_record(record: Any, rules: RecordRules) -> dict[str, Any]:
    """A record in the published schema: `images` is `image`, a `system` text is the first turn.

    Ignored fields, and unknown ones without a value, are left out. Raises DataError for any other
    field, and for a record of another form.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record is a JSON {type(record).__name__}, not an object")
    fields = {key: value for key, value in record.items() if key not in rules.ignored}
    if rules.described is not None:
        fields = rules.described(fields, rules)
    if rules.form not in (None, PUBLISHED) or not _is_published(fields):
        from neounify.data.forms import published

        fields = published(fields, rules)
    else:
        rules.forms[PUBLISHED] += 1
    conversations = fields.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError('"conversations" must be a list of turns that is not empty')
    for key, value in list(fields.items()):
        if key not in FIELDS:
            if value not in (None, "", [], {}):
                raise DataError(_unknown(key))
            del fields[key]
    _merge_images(fields)
    _merge_system(fields, conversations)
    for turn in conversations:
        if isinstance(turn, Mapping) and (
            extra := set(turn) - set(TURN_FIELDS) - set(rules.ignored)
        ):
            raise DataError(
                f'a turn has the unknown field "{min(extra, key=str)}"; it has "from" and "value"'
            )
    return fields


def _is_published(fields: Mapping[str, Any]) -> bool:
    """Whether a record has conversations, and no messages in them."""
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "conversations" in fields
    return not isinstance(turns[0], Mapping) or "content" not in turns[0]


def _unknown(key: Any) -> str:
    name = str(key)[:40]
    if name in MEDIA:
        return f'the field "{name}": only images and text can be trained on'
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


def _segment_flags(turn: Turn) -> list[bool]:
    """Loss flags of a turn with adjacent text parts joined, as the schema joins them."""
    flags: list[bool] = []
    previous: Part | None = None
    for part in turn.parts:
        if isinstance(previous, SampleText) and isinstance(part, SampleText):
            if previous.loss != part.loss:
                raise DataError(
                    "adjacent text parts differ in their loss, which JSONL cannot express"
                )
        else:
            flags.append(part.loss)
        previous = part
    return flags


def _image_paths(value: Any, blobs: dict[str, bytes]) -> list[str]:
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise DataError('"image" must be a path or a list of paths, none of them empty')
    if len(paths) > MAX_IMAGES:
        raise DataError(f"a record names {len(paths):,} images, at most {MAX_IMAGES:,} are read")
    for path in paths:
        if "://" in path and not path.startswith("data:"):
            raise DataError(f"{path[:80]!r} is an address; download the image and name its file")
    return [_stored(path, blobs) if path.startswith("data:") else path for path in paths]


def _stored(url: str, blobs: dict[str, bytes]) -> str:
    """The name of the content of a data URL (RFC 2397) among `blobs`."""
    head, comma, content = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise DataError(f"{url[:40]!r}… is no image in base64 (data:image/png;base64,…)")
    try:
        blobs[name := f"bytes-{len(blobs)}"] = base64.b64decode(content, validate=True)
    except ValueError as error:
        raise DataError(f"{head!r:.60}: the content is not base64 ({error})") from error
    return name


def _speaker_and_value(entry: Any) -> tuple[Role, str]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("value"), str):
        raise DataError('each of "conversations" needs a "from" and a text "value"')
    speaker = entry.get("from")
    if not isinstance(speaker, str) or speaker not in ROLE_OF:
        raise DataError(f'"from" is {speaker!r:.80}; known are {", ".join(ROLE_OF)}')
    return ROLE_OF[speaker], entry["value"]


def _with_leading_marks(values: list[tuple[Role, str]], missing: int) -> list[tuple[Role, str]]:
    """Put images without a mark in front of the first user turn, as at inference."""
    for index, (role, value) in enumerate(values):
        if role == "user":
            marked = (role, f"{IMAGE_MARK}\n" * missing + value)
            return [*values[:index], marked, *values[index + 1 :]]
    raise DataError(f"{missing} images have no {IMAGE_MARK} mark and there is no human turn")


def _read_turn(role: Role, value: str, paths: Any, flags: Any) -> Turn:
    segments = [s for s in re.split(f"({re.escape(IMAGE_MARK)})", value) if s]
    if flags is None:
        flags = [role == "assistant"] * len(segments)
    if not isinstance(flags, list) or [type(flag) for flag in flags] != [bool] * len(segments):
        raise DataError(f'"loss" of a turn must be {len(segments)} booleans, one per part')
    parts: list[Part] = []
    for segment, loss in zip(segments, flags, strict=True):
        if segment == IMAGE_MARK:
            parts.append(SampleImage(next(paths), "target" if loss else "input"))
        else:
            parts.append(SampleText(segment, loss))
    return Turn(role, tuple(parts))


def _infer_task(turns: Sequence[Turn]) -> str:
    shown = any(isinstance(p, SampleImage) for t in turns if t.role == "user" for p in t.parts)
    answer = [part for turn in turns if turn.role == "assistant" for part in turn.parts]
    targets = sum(isinstance(part, SampleImage) for part in answer)
    written = "".join(part.text for part in answer if isinstance(part, SampleText)).strip()
    if not targets:
        return "vqa" if shown else "text"
    thought = written.startswith("<think>") and written.endswith("</think>")
    if targets > 1 or (written and not thought):
        return "interleave"
    return ("edit" if shown else "t2i") + ("_think" if thought else "")
