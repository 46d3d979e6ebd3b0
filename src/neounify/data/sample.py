"""Training samples: the type that every source of data yields.

A `Sample` is turns of text, image and clip parts, each with its loss flag. A thought is literal
text of the assistant turn, `<think>\\n…\\n</think>\\n\\n`; the empty thought before an answer
without one belongs to the chat template and is not part of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic.dataclasses import dataclass as config_dataclass

from neounify.config.ranges import STRICT, Count, Positive
from neounify.errors import NeounifyError
from neounify.files import is_unicode
from neounify.text import IMAGE_MARK, Role
from neounify.text.forms import VIDEO_MARK

THINK_OPEN, THINK_CLOSE = "<think>\n", "\n</think>\n\n"
TASKS = (
    *("t2i", "t2i_think", "vqa", "caption", "edit", "edit_think", "interleave", "text"),
    *("t2v", "video_qa", "video_caption", "next_frames"),
)
"""Of text and images and, last, of clips: from text, questions, captions, next frames."""

ImageLike = Image.Image | NDArray[np.uint8] | Path

SPEAKER_OF: dict[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}


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
        for mark, part in ((IMAGE_MARK, "SampleImage"), (VIDEO_MARK, "SampleClip")):
            if mark in self.text:
                raise DataError(f"a text part contains {mark!r}; use a {part} there")
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
    as so many images. Its text has the time of each tube or image in front of it: of `times`, in
    seconds from the first frame, or by the rate where there are none.
    """

    frames: NDArray[np.uint8] | Sequence[ImageLike]
    role: Literal["input", "target"]
    fps: float = 24.0
    tubes: bool = True
    times: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.times is not None and len(self.times) != len(self.frames):
            raise DataError(f"a clip has {len(self.times)} times for {len(self.frames)} frames")
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

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        height, width, _ = SampleImage(self.frames[0], self.role).pixels().shape
        return height, width

    def seconds(self, frame: int) -> float:
        """The time of a frame from the first."""
        return frame / self.fps if self.times is None else self.times[frame] - self.times[0]


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class ClipReading:
    """Frames that are read of the clips of files; None is the rule of the model.

    Of a clip to look at, `fps` frames a second, at most `max_frames`; with `tubes`, in tubes where
    the rule of tubes applies (`video/choice.py`). Of a clip to generate, and of one before it,
    `target_fps` a second; a longer one is refused, unless `target_frames` takes its first ones.
    """

    fps: Positive | None = None
    max_frames: Count | None = None
    tubes: bool = False
    target_fps: Positive | None = None
    target_frames: Count | None = None


@dataclass(frozen=True, eq=False)
class ClipFile:
    """A clip in a file, or its bytes; the encoder reads the frames that its model sees.

    `name` is for messages. The rest is as in `SampleClip`.
    """

    file: Path | bytes
    role: Literal["input", "target"]
    reading: ClipReading = field(default_factory=ClipReading)
    name: str = ""

    @property
    def loss(self) -> bool:
        """Whether the clip carries the image loss."""
        return self.role == "target"


Part = SampleText | SampleImage | SampleClip | ClipFile


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
    def clips(self) -> tuple[SampleClip | ClipFile, ...]:
        """All clips, in order."""
        kinds = (SampleClip, ClipFile)
        return tuple(p for turn in self.turns for p in turn.parts if isinstance(p, kinds))

    def with_parts(self, change: Callable[[Part], Part]) -> Sample:
        """The sample with `change(part)` in place of each part."""
        turns = (Turn(turn.role, tuple(map(change, turn.parts))) for turn in self.turns)
        return replace(self, turns=tuple(turns))

    def text(self, role: Role | None = None) -> str:
        """The text of all turns, or of one role's, with a mark in place of each image and clip."""
        chosen = [turn for turn in self.turns if role in (None, turn.role)]
        return "\n".join(turn.value for turn in chosen)
