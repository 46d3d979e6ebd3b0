"""Multimodal training samples: turns of text and picture parts, each with its loss flag.

A `Sample` is what every source of data yields: the world of scenes, JSONL files, tar shards.
The published training schema is one JSON object per sample,

    {"conversations": [{"from": "human", "value": "<image>\\nMake it red."},
                       {"from": "gpt", "value": "<image>"}],
     "image": ["source.png", "target.png"]}

whose `<image>` marks stand for the paths in order. A picture in a human turn is an input, one
in a gpt turn is a target. Text is trained on in gpt turns only. Two keys of our own are
optional: "task", and "loss" (per turn, per part) where it differs from that rule.

A thought is literal text of the assistant turn, `<think>\\n…\\n</think>\\n\\n`; the empty thought
that precedes an answer without one belongs to the chat template and is not written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.errors import NeounifyError
from neounify.text import IMAGE_MARK, Role

THINK_OPEN, THINK_CLOSE = "<think>\n", "\n</think>\n\n"
TASKS = ("t2i", "t2i_think", "vqa", "caption", "edit", "edit_think", "interleave", "text")

Picture = Image.Image | NDArray[np.uint8] | Path

_ROLE_OF: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_SPEAKER_OF: dict[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}
# Names that published data files use for what is one of our tasks.
_TASK_ALIASES = {
    "mm_t2i": "t2i",
    "it2i": "edit",
    "mm_it2i": "edit",
    "interleave_gen": "interleave",
    "mm_interleave_gen": "interleave",
    "mm_interleaved": "vqa",
    "multimodal": "vqa",
}


class DataError(NeounifyError, ValueError):
    """A training sample, a data file or a scene setting is damaged or inconsistent."""


@dataclass(frozen=True)
class TextPart:
    """A stretch of text; `loss`: whether its tokens are trained on."""

    text: str
    loss: bool = False

    def __post_init__(self) -> None:
        if not self.text:
            raise DataError("a text part is empty; leave it out")
        if IMAGE_MARK in self.text:
            raise DataError(f"a text part contains {IMAGE_MARK!r}; use an ImagePart there")


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A picture: uint8 RGB array [height, width, 3], an RGB PIL image, or the path of a file.

    `role` "input" is only looked at; "target" is painted, that is, carries the image loss.
    """

    image: Picture
    role: Literal["input", "target"]

    def __post_init__(self) -> None:
        if self.role not in ("input", "target"):
            raise DataError(f"the role of a picture is {self.role!r}, not 'input' or 'target'")
        if isinstance(self.image, np.ndarray):
            shape, dtype = self.image.shape, self.image.dtype
            if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
                raise DataError(f"a picture array is {dtype} {list(shape)}, not uint8 [h, w, 3]")
        elif isinstance(self.image, Image.Image):
            if self.image.mode != "RGB":
                raise DataError(f"a picture has mode {self.image.mode}; convert it to RGB first")
        elif not isinstance(self.image, Path):
            raise DataError(
                f"a picture is a {type(self.image).__name__}, not an array, PIL or Path"
            )

    @property
    def loss(self) -> bool:
        """Whether the picture is trained on."""
        return self.role == "target"

    def pixels(self) -> NDArray[np.uint8]:
        """The picture as uint8 [height, width, 3]; a path must be read by the loader first."""
        if isinstance(self.image, Path):
            raise DataError(f"the picture {self.image} has not been read yet")
        return np.asarray(self.image)


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Turn:
    """What one speaker says and shows, in order."""

    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in _SPEAKER_OF:
            raise DataError(f"a turn has the role {self.role!r}, not one of {list(_SPEAKER_OF)}")
        if self.role != "assistant" and any(part.loss for part in self.parts):
            raise DataError(f"a {self.role} turn carries a loss; only assistant turns may")


@dataclass(frozen=True)
class Sample:
    """One training document: an optional system turn, then user and assistant by turns."""

    task: str
    turns: tuple[Turn, ...]
    id: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"the task {self.task!r} is unknown; tasks are {', '.join(TASKS)}")
        roles = [turn.role for turn in self.turns]
        talk = roles[1:] if roles[:1] == ["system"] else roles
        if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
            raise DataError(
                f"turns must be a system turn or none, then user and assistant by turns: {roles}"
            )
        if not any(part.loss for turn in self.turns for part in turn.parts):
            raise DataError("the sample has nothing to learn: no part carries a loss")

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """All pictures, in order."""
        return tuple(p for turn in self.turns for p in turn.parts if isinstance(p, ImagePart))

    def text(self, role: Role | None = None) -> str:
        """The text of all turns, or of one role's, with `<image>` where a picture stands."""
        chosen = [turn for turn in self.turns if role in (None, turn.role)]
        return "\n".join(_value_of(turn) for turn in chosen)


def sample_to_record(sample: Sample, image_paths: Sequence[str]) -> dict[str, Any]:
    """The sample in the published schema; `image_paths`: one per picture, in order."""
    if len(image_paths) != len(sample.images):
        raise DataError(f"{len(sample.images)} pictures, but {len(image_paths)} paths")
    record: dict[str, Any] = {
        "conversations": [
            {"from": _SPEAKER_OF[turn.role], "value": _value_of(turn)} for turn in sample.turns
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


def write_sample(sample: Sample, folder: Path, stem: str) -> dict[str, Any]:
    """Write the pictures to `folder` as PNG, named `stem`-0.png, …, and return the record.

    Paths in the record are relative to `folder`; pictures that are files already keep theirs.
    """
    paths = []
    for number, part in enumerate(sample.images):
        if isinstance(part.image, Path):
            paths.append(part.image.as_posix())
            continue
        name = f"{stem}-{number}.png"
        Image.fromarray(part.pixels()).save(folder / name)
        paths.append(name)
    return sample_to_record(sample, paths)


def sample_from_record(record: Any, folder: Path, task: str | None = None) -> Sample:
    """Read one JSON object of the published schema; pictures stay paths below `folder`.

    `task` overrides the record's own "task"; where neither is given it follows from the parts.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record is a JSON {type(record).__name__}, not an object")
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError('a record has no list "conversations"')
    paths = _image_paths(record.get("image"))
    flags = record.get("loss")
    if flags is not None and (not isinstance(flags, list) or len(flags) != len(conversations)):
        raise DataError('"loss" must be a list with one list of flags per turn')
    values = [_speaker_and_value(entry) for entry in conversations]
    marks = sum(value.count(IMAGE_MARK) for _, value in values)
    if marks < len(paths):
        values = _with_leading_marks(values, len(paths) - marks)
    elif marks > len(paths):
        raise DataError(f"{marks} {IMAGE_MARK} marks, but {len(paths)} pictures")
    remaining = iter(folder / path for path in paths)
    turns = tuple(
        _read_turn(role, value, remaining, None if flags is None else flags[index])
        for index, (role, value) in enumerate(values)
    )
    named = task or record.get("task")
    if named is None:
        named = _infer_task(turns)
    if not isinstance(named, str):
        raise DataError(f'"task" is {named!r}, not a string')
    return Sample(_TASK_ALIASES.get(named, named), turns, str(record.get("id", "")))


def _value_of(turn: Turn) -> str:
    return "".join(p.text if isinstance(p, TextPart) else IMAGE_MARK for p in turn.parts)


def _segment_flags(turn: Turn) -> list[bool]:
    """Loss flags of a turn once text parts that touch are joined, as the schema joins them."""
    flags: list[bool] = []
    previous: Part | None = None
    for part in turn.parts:
        if isinstance(previous, TextPart) and isinstance(part, TextPart):
            if previous.loss != part.loss:
                raise DataError("text parts that touch differ in their loss; JSONL cannot say so")
        else:
            flags.append(part.loss)
        previous = part
    return flags


def _image_paths(value: Any) -> list[str]:
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise DataError('"image" must be a path or a list of paths')
    return paths


def _speaker_and_value(entry: Any) -> tuple[Role, str]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("value"), str):
        raise DataError('each of "conversations" needs a "from" and a text "value"')
    speaker = entry.get("from")
    if not isinstance(speaker, str) or speaker not in _ROLE_OF:
        raise DataError(f'"from" is {speaker!r}; known are {", ".join(_ROLE_OF)}')
    return _ROLE_OF[speaker], entry["value"]


def _with_leading_marks(values: list[tuple[Role, str]], missing: int) -> list[tuple[Role, str]]:
    """Pictures without a mark are put in front of the first user turn, as at inference."""
    for index, (role, value) in enumerate(values):
        if role == "user":
            marked = (role, f"{IMAGE_MARK}\n" * missing + value)
            return [*values[:index], marked, *values[index + 1 :]]
    raise DataError(f"{missing} pictures have no {IMAGE_MARK} mark and there is no human turn")


def _read_turn(role: Role, value: str, paths: Any, flags: Any) -> Turn:
    segments = [s for s in re.split(f"({re.escape(IMAGE_MARK)})", value) if s]
    if flags is None:
        flags = [role == "assistant"] * len(segments)
    if not isinstance(flags, list) or [type(flag) for flag in flags] != [bool] * len(segments):
        raise DataError(f'"loss" of a turn must be {len(segments)} booleans, one per part')
    parts: list[Part] = []
    for segment, loss in zip(segments, flags, strict=True):
        if segment == IMAGE_MARK:
            parts.append(ImagePart(next(paths), "target" if loss else "input"))
        else:
            parts.append(TextPart(segment, loss))
    return Turn(role, tuple(parts))


def _infer_task(turns: Sequence[Turn]) -> str:
    shown = any(isinstance(p, ImagePart) for t in turns if t.role == "user" for p in t.parts)
    answer = [part for turn in turns if turn.role == "assistant" for part in turn.parts]
    painted = sum(isinstance(part, ImagePart) for part in answer)
    written = "".join(part.text for part in answer if isinstance(part, TextPart)).strip()
    if not painted:
        return "vqa" if shown else "text"
    thought = written.startswith("<think>") and written.endswith("</think>")
    if painted > 1 or (written and not thought):
        return "interleave"
    return ("edit" if shown else "t2i") + ("_think" if thought else "")
