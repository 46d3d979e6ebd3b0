"""The published JSON schema of records, read as samples and written.

    {"conversations": [{"from": "human", "value": "<image>\\nMake it red."},
                       {"from": "gpt", "value": "<image>"}],
     "image": ["source.png", "target.png"]}

is a record: `<image>` marks stand for the paths in order, and `<video>` marks for those of "video".
An image or clip in a human turn is an input, one in a gpt turn is a target. Only gpt turns carry a
text loss. "images" and "videos" are other names for "image" and "video"; "system" is the text of a
system turn. Two further keys are optional: "task", and "loss" (per turn, per part) where it differs
from that rule. Other fields are refused.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from neounify.data.sample import (
    SPEAKER_OF,
    ClipFile,
    ClipReading,
    DataError,
    Part,
    Sample,
    SampleImage,
    SampleText,
    Turn,
)
from neounify.text import IMAGE_MARK, Role
from neounify.text.forms import VIDEO_MARK

PUBLISHED = "conversations"
"""The form of records in the published schema."""
TURN_FIELDS = ("from", "value")
SOUND = ("audio", "audios")

ROLE_OF: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}

MAX_ID_CHARS = 200


@dataclass(frozen=True)
class Medium:
    """Field `name` of a record, or its plural, with the paths that `mark` stands for in texts.

    A record names at most `most` of them; each is read before its tokens are counted.
    """

    name: str
    noun: str
    mark: str
    most: int

    @property
    def fields(self) -> tuple[str, str]:
        return self.name, f"{self.name}s"


IMAGES = Medium("image", "image", IMAGE_MARK, 1000)
CLIPS = Medium("video", "clip", VIDEO_MARK, 100)
MEDIA = (IMAGES, CLIPS)
MARKS = re.compile("|".join(re.escape(medium.mark) for medium in MEDIA))

FIELDS = ("conversations", *IMAGES.fields, *CLIPS.fields, "system", "task", "loss", "id")

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


def sample_to_record(
    sample: Sample, image_paths: Sequence[str], clip_paths: Sequence[str] = ()
) -> dict[str, Any]:
    """The sample in the published schema; a path for each image and for each clip, in order."""
    for there, paths, medium in (
        (sample.images, image_paths, IMAGES),
        (sample.clips, clip_paths, CLIPS),
    ):
        if len(paths) != len(there):
            raise DataError(f"{len(there)} {medium.noun}s, but {len(paths)} paths")
    record: dict[str, Any] = {
        "conversations": [
            {"from": SPEAKER_OF[turn.role], "value": turn.value} for turn in sample.turns
        ],
        "image": list(image_paths),
        "task": sample.task,
    }
    if clip_paths:
        record["video"] = list(clip_paths)
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
    the data says. `clips` says which frames of their clips are read. Of the records that this
    process reads, fields that were left out because they cannot change a sample are added to
    `unread`, and `forms` are counted.
    """

    task: str | None = None
    form: str | None = None
    ignored: tuple[str, ...] = ()
    described: Callable[[dict[str, Any], RecordRules], dict[str, Any]] | None = None
    clips: ClipReading = field(default_factory=ClipReading)
    unread: set[str] = field(default_factory=set)
    forms: Counter[str] = field(default_factory=Counter)


def sample_from_record(
    record: Any,
    folder: Path,
    rules: RecordRules | None = None,
    blobs: dict[str, bytes] | None = None,
) -> Sample:
    """Read one JSON object of the published schema, or of another of `FORMS`.

    Images and clips stay paths below `folder`; contents that a record holds as data URLs go into
    `blobs` by the name of their path. Without a "task", it is inferred. Raises DataError, also for
    unknown fields.
    """
    rules = rules or RecordRules()
    record = checked_record(record, rules)
    conversations = record["conversations"]
    blobs = {} if blobs is None else blobs
    flags = record.get("loss")
    if flags is not None and (not isinstance(flags, list) or len(flags) != len(conversations)):
        raise DataError('"loss" must be a list with one list of flags per turn')
    values = [_speaker_and_value(entry) for entry in conversations]
    paths_of: dict[str, Iterator[Path]] = {}
    for medium in reversed(MEDIA):  # images without a mark precede clips without one
        paths = _paths(record.get(medium.name), medium, blobs)
        marks = sum(value.count(medium.mark) for _, value in values)
        if marks < len(paths):
            values = _with_leading_marks(values, medium, len(paths) - marks)
        elif marks > len(paths):
            raise DataError(f"{marks} {medium.mark} marks, but {len(paths)} {medium.noun}s")
        paths_of[medium.mark] = iter([folder / path for path in paths])
    turns = tuple(
        _read_turn(role, value, paths_of, None if flags is None else flags[index], rules)
        for index, (role, value) in enumerate(values)
    )
    _check_clips(turns)
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
    for medium in MEDIA:
        _merge(fields, medium)
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
    if name in SOUND:
        return f'the field "{name}": only text, images and clips can be trained on'
    close = get_close_matches(name, FIELDS, n=1)
    hint = f'; did you mean "{close[0]}"?' if close else f"; known are {', '.join(FIELDS)}"
    return f'unknown field "{name}"{hint} (fields not to be read: ignore = [...] in the recipe)'


def _merge(fields: dict[str, Any], medium: Medium) -> None:
    one, several = medium.fields
    paths = fields.pop(several, None)
    if paths is None:
        return
    if fields.get(one) not in (None, paths):
        raise DataError(f'a record has both "{one}" and "{several}"; give one of them')
    fields[one] = paths


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


def _paths(value: Any, medium: Medium, blobs: dict[str, bytes]) -> list[str]:
    if value is None:
        return []
    name, noun = medium.name, medium.noun
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise DataError(f'"{name}" must be a path or a list of paths, none of them empty')
    if len(paths) > medium.most:
        raise DataError(f"a record names {len(paths):,} {noun}s, at most {medium.most:,} are read")
    for path in paths:
        if "://" in path and not path.startswith("data:"):
            raise DataError(f"{path[:80]!r} is an address; download the {noun} and name its file")
    return [_stored(path, medium, blobs) if path.startswith("data:") else path for path in paths]


def _stored(url: str, medium: Medium, blobs: dict[str, bytes]) -> str:
    """The name of the content of a data URL (RFC 2397) among `blobs`."""
    head, comma, content = url.partition(",")
    if not comma or not head.startswith(f"data:{medium.name}/") or not head.endswith(";base64"):
        kind = "image/png" if medium is IMAGES else "video/mp4"
        raise DataError(f"{url[:40]!r}… is no {medium.noun} in base64 (data:{kind};base64,…)")
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


def _with_leading_marks(
    values: list[tuple[Role, str]], medium: Medium, missing: int
) -> list[tuple[Role, str]]:
    """Put images or clips without a mark in front of the first user turn, as at inference."""
    mark = f"{medium.mark}\n" if medium is IMAGES else medium.mark
    for index, (role, value) in enumerate(values):
        if role == "user":
            return [*values[:index], (role, mark * missing + value), *values[index + 1 :]]
    raise DataError(
        f"{missing} {medium.noun}s have no {medium.mark} mark and there is no human turn"
    )


def segments(value: str) -> list[str]:
    """The value of a turn cut into texts and marks, none of them empty."""
    return [s for s in re.split(f"({MARKS.pattern})", value) if s]


def _read_turn(
    role: Role, value: str, paths: Mapping[str, Iterator[Path]], flags: Any, rules: RecordRules
) -> Turn:
    pieces = segments(value)
    if flags is None:
        flags = [role == "assistant"] * len(pieces)
    if not isinstance(flags, list) or [type(flag) for flag in flags] != [bool] * len(pieces):
        raise DataError(f'"loss" of a turn must be {len(pieces)} booleans, one per part')
    parts: list[Part] = []
    for piece, loss in zip(pieces, flags, strict=True):
        if piece == IMAGES.mark:
            parts.append(SampleImage(next(paths[piece]), "target" if loss else "input"))
        elif piece == CLIPS.mark:
            path = next(paths[piece])
            parts.append(ClipFile(path, "target" if loss else "input", rules.clips, path.name))
        else:
            parts.append(SampleText(piece, loss))
    return Turn(role, tuple(parts))


def _check_clips(turns: Sequence[Turn]) -> None:
    """Raise DataError for a clip to generate beside what inference has no prompt for."""
    parts = [part for turn in turns for part in turn.parts]
    clips = [part for part in parts if isinstance(part, ClipFile)]
    images = [part for part in parts if isinstance(part, SampleImage)]
    targets = sum(clip.loss for clip in clips)
    if targets > 1:
        raise DataError(f"{targets} clips to generate; a record has at most one, at its end")
    if targets and images:
        raise DataError("a clip to generate may follow a text and the clip before it, not images")
    if clips and any(image.loss for image in images):
        raise DataError("an image to generate may follow texts and images, not clips")


def _infer_task(turns: Sequence[Turn]) -> str:
    shown = [part for turn in turns if turn.role == "user" for part in turn.parts]
    shows_clip = any(isinstance(part, ClipFile) for part in shown)
    shows_image = any(isinstance(part, SampleImage) for part in shown)
    answer = [part for turn in turns if turn.role == "assistant" for part in turn.parts]
    targets = sum(isinstance(part, SampleImage) for part in answer)
    written = "".join(part.text for part in answer if isinstance(part, SampleText)).strip()
    if any(isinstance(part, ClipFile) for part in answer):
        return "next_frames" if shows_clip else "t2v"
    if not targets:
        return "video_qa" if shows_clip else "vqa" if shows_image else "text"
    thought = written.startswith("<think>") and written.endswith("</think>")
    if targets > 1 or (written and not thought):
        return "interleave"
    return ("edit" if shows_image else "t2i") + ("_think" if thought else "")
