"""Results of the tasks, and their collection from the events of programs on a driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.decode.sampler import FinishReason, LogProbs
from neounify.deprecation import moved
from neounify.engine.messages import DecodedToken
from neounify.image.pixels import to_pil
from neounify.pipeline.driver import Driver, Event
from neounify.tasks.chat import ChatRequest, chat
from neounify.tasks.frames import image_program
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest, interleave
from neounify.tasks.program import (
    ClipFrames,
    Finished,
    FramesFinished,
    ImageFinished,
    Preview,
    Processor,
    PromptPrefilled,
    TextPiece,
    ToolCallPiece,
    keep_prompt,
)
from neounify.text.tools import ToolCall
from neounify.video.clip import Video


@dataclass(frozen=True)
class ChatResult:
    """An answer. `token_ids` are the model's, `<|im_end|>` not included.

    If tools were offered, `tool_calls` are the calls in the answer, in order, and are no part of
    `text`. `logprobs` has one entry per token if requested.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[LogProbs, ...] = ()


@dataclass(frozen=True)
class ImageResult:
    """Generated images, prompt by prompt, or `videos`, and then no images.

    `pixels` [B, channels, H, W] float32 in about [-1, 1], not clamped; `thoughts` one text per
    prompt, None without `think`; `seeds` one per prompt, None with explicit noise. `evaluations` of
    the network were spent on each of the B images, each guidance branch counted.
    """

    pixels: Float[Tensor, "b c h w"]
    thoughts: list[str | None]
    seeds: list[int | None]
    evaluations: list[float]
    videos: list[Video] = field(default_factory=list)

    @cached_property
    def images(self) -> list[PIL.Image.Image]:
        return to_pil(self.pixels)


@dataclass(frozen=True)
class ImageProgress:
    """The state after one denoising step; `step` counts from 1 to `steps`."""

    step: int
    steps: int
    clean: Float[Tensor, "b c h w"]
    """The clean images predicted so far, in about [-1, 1]."""

    def preview(self) -> list[PIL.Image.Image]:
        """The predicted clean images as PIL images."""
        return to_pil(self.clean)


@dataclass(frozen=True)
class TextPart:
    """A piece of text of an interleaved answer, as soon as it is complete characters."""

    text: str


@dataclass(frozen=True)
class PreviewPart:
    """The image in progress, after one more step; `image` is converted on first use."""

    progress: ImageProgress

    @cached_property
    def image(self) -> PIL.Image.Image:
        return self.progress.preview()[0]


@dataclass(frozen=True)
class ImagePart:
    """A finished image of an interleaved answer; `pixels` [channels, H, W] in about [-1, 1].

    `evaluations` of the network were spent on it, each guidance branch counted.
    """

    pixels: Float[Tensor, "c h w"]
    evaluations: float

    @cached_property
    def image(self) -> PIL.Image.Image:
        return to_pil(self.pixels[None])[0]


InterleavePart = TextPart | PreviewPart | ImagePart

Callback = Callable[[ImageProgress], None]


# --- chat ---


class ChatRun:
    """Answers to several requests at once.

    Iterating yields (number of the request, piece of text); afterwards `results` holds the whole
    answers. All prompts are prefilled on construction, which raises their errors.
    """

    def __init__(
        self, driver: Driver, processor: Processor, requests: Sequence[ChatRequest]
    ) -> None:
        self._answers = [_Answer() for _ in requests]
        self._steps = driver.run([chat(processor, r, thoughts=False) for r in requests])
        self._pieces: list[tuple[int, str]] = []
        while not all(answer.read for answer in self._answers):
            self._take(next(self._steps))

    def finish(self) -> list[ChatResult]:
        """Decode all answers to their ends."""
        for _ in self:
            pass
        return self.results

    def __iter__(self) -> Iterator[tuple[int, str]]:
        while True:
            pieces, self._pieces = self._pieces, []
            yield from pieces
            events = next(self._steps, None)
            if events is None:
                return
            self._take(events)

    def _take(self, events: Sequence[tuple[int, Event]]) -> None:
        for number, event in events:
            if piece := self._answers[number].put(event):
                self._pieces.append((number, piece))

    @property
    def results(self) -> list[ChatResult]:
        """The answers so far."""
        return [answer.result() for answer in self._answers]


class _Answer:
    """One answer so far."""

    def __init__(self) -> None:
        self.read = False
        self._prompt_tokens = 0
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[LogProbs] = []
        self._calls: list[ToolCall] = []
        self._finish_reason: FinishReason = "stop"

    def put(self, event: Event) -> str:
        """Record an event; returns its text."""
        match event:
            case PromptPrefilled(tokens):
                self.read, self._prompt_tokens = True, tokens
            case DecodedToken(token, logprobs):
                self._ids.append(token)
                if logprobs is not None:
                    self._logprobs.append(logprobs)
            case TextPiece(text):
                if text:
                    self._pieces.append(text)
                return text
            case ToolCallPiece(name, arguments):
                self._calls.append(ToolCall(name, arguments))
            case Finished():
                self._finish_reason = event.finish_reason
        return ""

    def result(self) -> ChatResult:
        return ChatResult(
            "".join(self._pieces),
            tuple(self._ids),
            self._finish_reason,
            self._prompt_tokens,
            tuple(self._calls),
            tuple(self._logprobs),
        )


class ChatStream:
    """Streaming answer: iterate for pieces of text, then read `result`."""

    def __init__(self, run: ChatRun) -> None:
        self._run = run
        self._iterator = iter(run)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._iterator)[1]

    @property
    def result(self) -> ChatResult:
        """The answer so far; complete once the iteration has ended."""
        return self._run.results[0]


# --- images ---


def run_images(
    driver: Driver,
    processor: Processor,
    requests: Sequence[ImageRequest],
    callback: Callback | None = None,
) -> ImageResult:
    """Generate all images, or clips, of all requests together; they have one size.

    `callback` is called after every denoising step.
    """
    negatives = {
        request.negative_prompt: f"uncond {number}"
        for number, request in enumerate(requests)
        if "uncond" in request.sampling.guidance.branches()
    }
    shared = [
        keep_prompt(name, processor.unconditional_prompt(negative))
        for negative, name in negatives.items()
    ]
    previews = 0 if callback is None else None
    programs = [image_program(processor, r, negatives, previews) for r in requests]
    collected = [_Images(request) for request in requests]
    for events in driver.run([*shared, *programs]):
        for number, event in events:
            collected[number - len(shared)].put(event)
        if callback is not None and any(isinstance(event, Preview) for _, event in events):
            callback(_progress(collected))
    tokenizer = processor.tokenizer
    done = [image for item in collected for image in item.in_order()]
    pixels = [image.pixels for image in done if isinstance(image, ImageFinished)]
    first = requests[0]
    empty = torch.empty(0, processor.config.channels, first.height, first.width)
    return ImageResult(
        pixels=torch.stack(pixels) if pixels else empty,
        thoughts=[
            tokenizer.decode(item.thought).strip() if item.request.think else None
            for item in collected
        ],
        seeds=[r.seed if r.noise is None else None for r in requests],
        evaluations=[image.evaluations for image in done],
        videos=[video for item in collected for video in item.videos()],
    )


class _Images:
    """Thought, previews and images of one request so far."""

    def __init__(self, request: ImageRequest) -> None:
        self.request = request
        self.thought: list[int] = []
        self.previews: dict[int, Preview] = {}
        self._images: dict[int, ImageFinished | FramesFinished] = {}
        self._clips: dict[int, ClipFrames] = {}

    def put(self, event: Event) -> None:
        match event:
            case DecodedToken(token):
                self.thought.append(token)
            case Preview(index):
                self.previews[index] = event
            case ImageFinished(index):
                self._images[index] = event
            case FramesFinished(index):
                self._clips.setdefault(index, ClipFrames(event.total)).put(event)
                self._images[index] = event

    def in_order(self) -> list[ImageFinished | FramesFinished]:
        """Every image, and of every clip its last frames."""
        return [self._images[index] for index in range(self.request.count)]

    def videos(self) -> list[Video]:
        """The clips, in order."""
        fps = self.request.fps
        return [Video(self._clips[n].whole(), Fraction(fps)) for n in sorted(self._clips)]


def _progress(collected: Sequence[_Images]) -> ImageProgress:
    previews = [item.previews[n] for item in collected for n in range(item.request.count)]
    return ImageProgress(
        max(preview.step for preview in previews),
        max(preview.steps for preview in previews),
        torch.stack([preview.pixels for preview in previews]),
    )


# --- interleaved answers ---


def run_interleaved(
    driver: Driver, processor: Processor, request: InterleaveRequest
) -> Iterator[InterleavePart]:
    """Run an interleaved answer; yields text pieces, a preview per step, each finished image."""
    program = interleave(processor, request, {}, None, thoughts=False)
    for events in driver.run([program]):
        for _, event in events:
            match event:
                case TextPiece(text) if text:
                    yield TextPart(text)
                case Preview(_, step, steps, pixels):
                    yield PreviewPart(ImageProgress(step, steps, pixels[None]))
                case ImageFinished():
                    yield ImagePart(event.pixels, event.evaluations)


__getattr__ = moved(
    __name__, __name__, {"PaintProgress": "ImageProgress", "PaintResult": "ImageResult"}
)
