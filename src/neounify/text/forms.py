"""Forms of prompts as data, one for each family of checkpoints, by which `template` builds them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TypeVar

from neounify.errors import PromptError
from neounify.text.tokens import (
    IM_END,
    IM_START,
    IMAGE_CLOSE,
    IMAGE_OPEN,
    REQUIRED,
    VISION_END,
    VISION_START,
)

T = TypeVar("T")
VIDEO_MARK = "<video>"
"""Stands in a user's text where a clip belongs."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How the prompts of a family differ; ChatML is common to all."""

    tokens: tuple[str, ...] = REQUIRED
    """Tokens that a tokenizer must have."""
    image_open: str = IMAGE_OPEN
    """Token before the tokens of an image."""
    image_close: str = IMAGE_CLOSE
    """Token behind the tokens of an image."""
    thinks: bool = True
    """Whether a thought, or an empty one, stands before an image."""
    paint_open: tuple[str, ...] = (IMAGE_OPEN,)
    """Tokens between an answer's head, or its thought, and a noisy image."""
    paint_system: bool = True
    """Whether prompts of images begin with the default system message of the package."""
    chat_system: str = ""
    """System message of a conversation that has none."""
    numbered: str = ""
    """What announces each of two or more images of a conversation, with {} for its number."""
    image_line: str = "\n"
    """What follows each image that stands in front, since the text has no mark for it."""
    number_marks: bool = False
    """Whether `<image 2>` marks the second image, and marks may have capitals."""
    one_piece: bool = True
    """Whether text between two special tokens is tokenised in one go, or part by part."""
    max_prompt_tokens: int | None = None
    """Tokens of the text of an image prompt at most."""


NEO = Template()
PIXELUMM = Template(
    tokens=(IM_START, IM_END, VISION_START, VISION_END),
    image_open=VISION_START,
    image_close=VISION_END,
    thinks=False,
    paint_open=(IM_END, VISION_START),
    paint_system=False,
    chat_system="You are a helpful assistant.",
    numbered="Picture {}: ",
    image_line="",
    number_marks=True,
    one_piece=False,
    max_prompt_tokens=4096,
)
TEMPLATES: Mapping[str, Template] = {"neo": NEO, "pixelumm": PIXELUMM}
"""Forms by the name that `ModelConfig.template` has."""


def default_system_message() -> str:
    """System message of image generation for models without one."""
    file = resources.files("neounify.text") / "system_message_generation.txt"
    return file.read_text(encoding="utf-8").strip()


def default_message(template: str) -> str:
    """System message of prompts of images in a form, for models without one."""
    return default_system_message() if TEMPLATES[template].paint_system else ""


_MARKS = re.compile(r"<image(?: (\d{1,9}))?>", re.IGNORECASE)


def marked(
    text: str, images: Sequence[T], mark: str = "<image>"
) -> tuple[str, list[T], tuple[int, ...]]:
    """A text with `mark` for each `<image>` or `<image N>`, its images in order, and their numbers.

    They are the first of `images`, as many as there are marks, where there are so many; the numbers
    are empty where the marks have none. Raises PromptError for marks of both kinds, and for
    numbered marks that are not one for each image.
    """
    marks = [match[1] for match in _MARKS.finditer(text)]
    numbers = tuple(int(number) for number in marks if number is not None)
    if numbers and len(numbers) < len(marks):
        raise PromptError("the text has marks with numbers and without; use one kind")
    is_whole = sorted(numbers) == list(range(1, len(numbers) + 1))
    if not is_whole or len(numbers) > len(images):
        raise PromptError(
            f"the text marks images {', '.join(map(str, numbers))}, but there are {len(images)}: "
            "mark each once, from <image 1> on"
        )
    first = list(images[: len(marks)])
    ordered = [first[number - 1] for number in numbers] if numbers else first
    return _MARKS.sub(mark, text), ordered, numbers


def unnumbered(text: str, mark: str = "<image>") -> str:
    """A text with `mark` for each `<image>`, for prompts that count images in their own order.

    Raises PromptError for marks with numbers.
    """
    if has_numbers(text):
        raise PromptError(
            "beside videos, and images that are parts of a message, images are marked by <image> "
            "without a number, in order"
        )
    return _MARKS.sub(mark, text)


def has_numbers(text: str) -> bool:
    """Whether images are marked by numbers, as `<image 2>`."""
    return any(match[1] for match in _MARKS.finditer(text))


def check_no_clip(text: str) -> None:
    """Raise PromptError for a mark of a clip that is left in a text, once its clips are placed."""
    if VIDEO_MARK in text:
        raise PromptError(
            f"the text has a {VIDEO_MARK} mark without a clip; such marks are for questions, one "
            "for each clip"
        )
