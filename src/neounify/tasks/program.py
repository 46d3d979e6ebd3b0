"""Programs: the workflow of one request as a generator of steps.

A driver runs a program: it carries out each step that the program yields and sends back the result,
or throws the error. Programs do no I/O and compute nothing that takes long, so the same one runs
in the caller's thread (`pipeline.driver`) and on an event loop (`serve.client`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from neounify.engine.messages import (
    Command,
    Export,
    Exported,
    ImageInput,
    ImageReady,
    KeepPrefix,
    Prefill,
    Prefilled,
    Prefix,
    PromptInput,
    Release,
    SequenceName,
    StepPreview,
    TensorRef,
    TextInput,
    Token,
    new_number,
)
from neounify.model.layout import Grid
from neounify.tasks.events import Finished, TaskEvent
from neounify.text.template import ImageSegment, Prompt, TextSegment

R = TypeVar("R")


@dataclass(frozen=True)
class NextAnswer:
    """Wait for the next answer to the latest command; it is sent back."""


@dataclass(frozen=True, eq=False)
class Compute:
    """Call a function that takes a while; its result is sent back."""

    function: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Pack:
    """Pack tensors into a reference, which a command can carry; it is sent back."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class PackImage:
    """Pack a prepared image [3, height, width] into an ImageInput; it is sent back."""

    pixels: Tensor
    grid: Grid


@dataclass(frozen=True, eq=False)
class Take:
    """Take the tensors out of a reference that came with an answer; they are sent back."""

    ref: TensorRef


NEXT = NextAnswer()
Effect = NextAnswer | Compute | Pack | PackImage | Take
Step = Command | Effect | TaskEvent | Token
"""A command is sent to its engine, and its first answer sent back; `Release` has none.

Events and tokens go to the caller; nothing is sent back.
"""
Program = Generator[Step, Any, R]


@dataclass(frozen=True, eq=False)
class Returned:
    """Return value of a program."""

    value: Any


def resume(program: Program[Any], value: object = None) -> Step | Returned:
    """Send the result of a step, or throw its error; returns the next step or the end."""
    try:
        if isinstance(value, Exception):
            return program.throw(value)
        return program.send(value)
    except StopIteration as end:
        return Returned(end.value)


def new_sequences(*labels: str) -> dict[str, SequenceName]:
    """Names for the sequences of one request, unique in this process."""
    number = new_number()
    return {label: (number, label) for label in labels}


def pack_images(images: Sequence[Tensor], side: int) -> Program[list[ImageInput]]:
    """Prepared images [3, height, width], each packed once; `side` is that of a token."""
    packed: list[ImageInput] = []
    for image in images:
        grid = Grid.of_pixels(image.shape[1], image.shape[2], side)
        packed.append((yield PackImage(image, grid)))
    return packed


def prompt_inputs(prompt: Prompt, images: Sequence[ImageInput]) -> tuple[PromptInput, ...]:
    """Prompt in the form that the understanding engine takes."""
    return tuple(
        images[segment.image] if isinstance(segment, ImageSegment) else TextInput(segment.ids)
        for segment in prompt.segments
    )


def export(names: Sequence[SequenceName]) -> Program[tuple[Prefix, ...]]:
    """Prefixes for the generation engine, in the order of the names."""
    exported: Exported = yield Export(new_number(), tuple(names))
    return exported.prefixes


def take_pixels(answer: StepPreview | ImageReady) -> Program[Tensor]:
    """Take the pixels [3, height, width] of a preview or an image."""
    tensors: Mapping[str, Tensor] = yield Take(answer.pixels)
    return tensors["pixels"]


def read_prefix(prompt: Prompt) -> Program[Prefix]:
    """Prefill a text prompt and export its prefix; its sequence is released again."""
    (name,) = new_sequences("shared").values()
    text = tuple(TextInput(s.ids) for s in prompt.segments if isinstance(s, TextSegment))
    yield Prefill(new_number(), {name: text}, {name: 0})
    (prefix,) = yield from export([name])
    yield Release((name,))
    return prefix


def prefill(ids: Sequence[int]) -> Program[None]:
    """Prefill text whose sequence stays until its context is closed."""
    (name,) = new_sequences("shared").values()
    yield Prefill(new_number(), {name: (TextInput(tuple(ids)),)}, {name: 0})


def keep(name: str, prefix: Prefix) -> Program[None]:
    """Keep a prefix in the generation engine under a name."""
    yield KeepPrefix(new_number(), name, prefix)


def keep_prompt(name: str, prompt: Prompt) -> Program[None]:
    """Keep the prefix of a text prompt in the generation engine under a name."""
    prefix = yield from read_prefix(prompt)
    yield from keep(name, prefix)


@dataclass
class Usage:
    """Token counts of one request for its last event; `prompt` is the conditional prompt's."""

    prompt: int = 0
    prompt_images: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    images: int = 0

    @classmethod
    def of(cls, prompt: Sequence[PromptInput], prefilled: Prefilled) -> Usage:
        """Usage after prefill."""
        images = sum(part.tokens for part in prompt if isinstance(part, ImageInput))
        tokens = sum(part.tokens for part in prompt)
        # Cached tokens of the other branches' prompts do not count.
        return cls(tokens, images, min(prefilled.cached, tokens))

    def finished(self, reason: str | None) -> Finished:
        """The last event."""
        return Finished(
            "length" if reason == "length" else "stop",
            prompt_tokens=self.prompt,
            completion_tokens=self.completion,
            cached_tokens=self.cached,
            image_tokens=self.images,
            prompt_image_tokens=self.prompt_images,
            reasoning_tokens=self.reasoning,
        )
