"""Programs: the workflow of one request as a generator of steps, and what they share.

A driver runs a program: it carries out each step that the program yields and sends back the result,
or throws the error. Programs do no I/O and compute nothing that takes long, so the same one runs
in the caller's thread (`pipeline.driver`) and on an event loop (`serve.service`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import PIL.Image
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from neounify.config import Capability, ModelConfig
from neounify.engine.messages import (
    Command,
    DecodedToken,
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
    new_number,
)
from neounify.errors import RequestError
from neounify.grammar import Vocabulary
from neounify.image.pixels import prepare_image
from neounify.model.layout import Grid
from neounify.tasks.clips import ClipPiece
from neounify.text.forms import TEMPLATES, Template, default_message
from neounify.text.template import ImageSegment, Prompt, TextSegment, unconditional_prompt
from neounify.text.tokenizer import Tokenizer

R = TypeVar("R")

# --- events: pieces of an answer as they are ready, `Finished` last ---


@dataclass(frozen=True)
class PromptPrefilled:
    """The prompt of a text answer is prefilled; another request can share its cache."""

    prompt_tokens: int = 0


@dataclass(frozen=True)
class TokenLogProb:
    """A token of an answer, its log-probability, and the likeliest alternatives."""

    token: bytes
    log_prob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class TextPiece:
    """Text as soon as it is complete characters; `thought` if it is part of a thought.

    `log_probs` are those of the tokens since the last piece, if requested.
    """

    text: str
    thought: bool = False
    log_probs: tuple[TokenLogProb, ...] = ()


@dataclass(frozen=True)
class ToolCallPiece:
    """A complete tool call; `arguments` are JSON, truncated if a limit ended the answer."""

    name: str
    arguments: str
    log_probs: tuple[TokenLogProb, ...] = ()


@dataclass(frozen=True, eq=False)
class Preview:
    """Clean prediction of image `index` after `step` of `steps`; about [-1, 1], not clamped."""

    index: int
    step: int
    steps: int
    pixels: Float[Tensor, "c h w"]


@dataclass(frozen=True, eq=False)
class ImageFinished:
    """Finished image `index` of the answer; about [-1, 1], float32 on the CPU, not clamped.

    `usage` counts the prompt, the text so far, and this image alone; `evaluations` are those of the
    network for this image, see `ImageReady`.
    """

    index: int
    pixels: Float[Tensor, "c h w"]
    usage: Finished
    evaluations: float


@dataclass(frozen=True, eq=False)
class FramesFinished:
    """Finished frames of clip `index` from number `first` of `total`, in the order of generation.

    `frames` are uint8 [n, height, width, channels]; `usage` and `evaluations` as of ImageFinished,
    for the clip so far.
    """

    index: int
    first: int
    total: int
    frames: UInt8[Tensor, "n h w c"]
    usage: Finished
    evaluations: float


class ClipFrames:
    """The frames of a clip as they come, in one tensor: `frames` [total, height, width, c] uint8.

    What has come before is not copied again, and an event need not be kept.
    """

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.frames: UInt8[Tensor, "total h w c"] | None = None

    def put(self, event: FramesFinished) -> None:
        """Take some frames in."""
        if self.frames is None:
            self.frames = event.frames.new_empty(self.total, *event.frames.shape[1:])
        self.frames[event.first : event.first + len(event.frames)] = event.frames
        self.count += len(event.frames)

    def whole(self) -> UInt8[Tensor, "total h w c"]:
        """All frames. Raises RuntimeError where some have not come."""
        if self.frames is None or self.count != self.total:
            raise RuntimeError(f"{self.total} frames were due, {self.count} came")
        return self.frames


@dataclass(frozen=True)
class Finished:
    """Last event of every complete answer.

    `prompt_tokens` are those of the conditional prompt: `prompt_image_tokens` of them are its
    images', `cached_tokens` were in the cache from earlier requests. `completion_tokens` are text,
    `reasoning_tokens` of them a thought; `image_tokens` those of generated images.
    """

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    image_tokens: int = 0
    prompt_image_tokens: int = 0
    reasoning_tokens: int = 0


TaskEvent = (
    PromptPrefilled
    | TextPiece
    | ToolCallPiece
    | Preview
    | ImageFinished
    | FramesFinished
    | Finished
)

# --- steps ---


@dataclass(frozen=True)
class NextAnswer:
    """Wait for the next answer to the latest command; it is sent back."""


@dataclass(frozen=True, eq=False)
class Compute:
    """Call a function that takes a while; its result is sent back."""

    function: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class PackTensors:
    """Pack tensors into a reference, which a command can carry; it is sent back."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class PackImage:
    """Pack a prepared image [3, height, width] or tube into an ImageInput; it is sent back."""

    pixels: Tensor
    grid: Grid


@dataclass(frozen=True, eq=False)
class Take:
    """Take the tensors out of a reference that came with an answer; they are sent back."""

    ref: TensorRef


NEXT = NextAnswer()
Effect = NextAnswer | Compute | PackTensors | PackImage | Take
Step = Command | Effect | TaskEvent | DecodedToken
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


# --- what programs share ---


class Processor:
    """Prepares prompts and images for one model; `dtype` is that of prepared images.

    `system_message` begins the prompts of images; None is the default of their form.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        system_message: str | None,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        default = default_message(config.template)
        self.system_message = default if system_message is None else system_message
        self.dtype = dtype

    @property
    def template(self) -> Template:
        """Form of the model's prompts."""
        return TEMPLATES[self.config.template]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of grammars; processes that sample tokens must hold one too."""
        return Vocabulary.of(self.tokenizer)

    def unconditional_prompt(self, negative: str = "") -> Prompt:
        """What guidance steers away from, see `text.template`."""
        return unconditional_prompt(self.tokenizer, negative, self.template)

    def check_writes_text(self, what: Capability = "chat", *, think: bool = False) -> None:
        """RequestError for a model without a text head, or not trained for what is asked of it."""
        self.config.check_can(what)
        if think:
            self.config.check_can("think")
        if not self.config.lm_head:
            raise RequestError(
                "this checkpoint has no lm_head, so it writes no text: it generates images from "
                "text and edits them, without thinking first"
            )

    def token(self, name: str) -> int:
        return self.tokenizer.id(name)

    def prepare(
        self,
        images: Sequence[PIL.Image.Image | ClipPiece],
        min_pixels: int,
        max_pixels: int,
    ) -> list[Tensor]:
        """Images [3, height, width] for the understanding stream, normalised.

        Each is resized to an area from `min_pixels` to `max_pixels`, those of a clip to one of
        theirs; tubes are [frames, 3, height, width].
        """
        prepared: list[Tensor] = []
        for image in images:
            if isinstance(image, ClipPiece):
                frames = torch.stack(self.prepare(image.frames, *image.bounds))
                prepared.append(frames if image.tube else frames[0])
            else:
                prepared += self._prepare([image], min_pixels, max_pixels)
        return prepared

    def _prepare(
        self, images: Sequence[PIL.Image.Image], min_pixels: int, max_pixels: int
    ) -> list[Tensor]:
        return [
            prepare_image(
                image,
                multiple=self.config.token_size,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                dtype=self.dtype,
                kind=self.config.und_pixels,
            )
            for image in images
        ]


def new_sequences(*labels: str) -> dict[str, SequenceName]:
    """Names for the sequences of one request, unique in this process."""
    number = new_number()
    return {label: (number, label) for label in labels}


def pack_images(images: Sequence[Tensor], side: int) -> Program[list[ImageInput]]:
    """Prepared images [3, height, width] and tubes, each packed once; `side` is that of a token."""
    packed: list[ImageInput] = []
    for image in images:
        grid = Grid.of_pixels(image.shape[-2], image.shape[-1], side)
        if image.ndim == 4:
            grid = replace(grid, tubes=1)
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
    """Take the pixels [channels, height, width] of a preview or an image."""
    tensors: Mapping[str, Tensor] = yield Take(answer.pixels)
    return tensors["pixels"]


def prefill_prefix(prompt: Prompt) -> Program[Prefix]:
    """Prefill a text prompt and export its prefix; its sequence is released again."""
    (name,) = new_sequences("shared").values()
    text = tuple(TextInput(s.ids) for s in prompt.segments if isinstance(s, TextSegment))
    yield Prefill(new_number(), {name: text}, {name: 0})
    (prefix,) = yield from export([name])
    yield Release((name,))
    return prefix


def pin(ids: Sequence[int]) -> Program[None]:
    """Prefill text for others to share; its sequence stays until its context is closed."""
    (name,) = new_sequences("shared").values()
    yield Prefill(new_number(), {name: (TextInput(tuple(ids)),)}, {name: 0}, pinned=True)


def keep(name: str, prefix: Prefix) -> Program[None]:
    """Keep a prefix in the generation engine under a name."""
    yield KeepPrefix(new_number(), name, prefix)


def keep_prompt(name: str, prompt: Prompt) -> Program[None]:
    """Keep the prefix of a text prompt in the generation engine under a name."""
    prefix = yield from prefill_prefix(prompt)
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
