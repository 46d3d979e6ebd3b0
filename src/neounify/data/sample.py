"""Multimodal training samples: turns of text and image parts, each with its loss flag.

Every source of data yields a `Sample`: synthetic scenes, JSON lines, tar shards.

A thought is literal text of the assistant turn, `<think>\\n…\\n</think>\\n\\n`; the empty thought
before an answer without one belongs to the chat template and is not part of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.errors import NeounifyError
from neounify.text import IMAGE_MARK, Role

THINK_OPEN, THINK_CLOSE = "<think>\n", "\n</think>\n\n"
TASKS = ("t2i", "t2i_think", "vqa", "caption", "edit", "edit_think", "interleave", "text")

ImageLike = Image.Image | NDArray[np.uint8] | Path

SPEAKER_OF: dict[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}


class DataError(NeounifyError, ValueError):
    """A training sample, a data file or a scene setting is damaged or inconsistent."""


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


Part = SampleText | SampleImage


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
        """Its text, with `<image>` in place of each image."""
        return "".join(p.text if isinstance(p, SampleText) else IMAGE_MARK for p in self.parts)


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

    def text(self, role: Role | None = None) -> str:
        """The text of all turns, or of one role's, with `<image>` in place of each image."""
        chosen = [turn for turn in self.turns if role in (None, turn.role)]
        return "\n".join(turn.value for turn in chosen)
