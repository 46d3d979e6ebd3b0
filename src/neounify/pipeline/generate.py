"""Pipeline calls as programs on a driver: chat, images, interleaved answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from neounify.decode.sampler import FinishReason, LogProbs
from neounify.engine.messages import Token
from neounify.pipeline.driver import Driver, Event
from neounify.pipeline.results import (
    ChatResult,
    ImagePart,
    ImageProgress,
    ImageResult,
    InterleavePart,
    PreviewPart,
    TextPart,
)
from neounify.tasks.chat import ChatRequest, chat
from neounify.tasks.events import (
    Finished,
    ImageFinished,
    Preview,
    PromptRead,
    TextPiece,
    ToolCallPiece,
)
from neounify.tasks.image import generate_images
from neounify.tasks.interleave import InterleaveRequest, interleave
from neounify.tasks.processor import Processor
from neounify.tasks.program import keep_prompt
from neounify.tasks.requests import ImageRequest
from neounify.text.template import unconditional_prompt
from neounify.text.tools import ToolCall

Callback = Callable[[ImageProgress], None]


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
            case PromptRead(tokens):
                self.read, self._prompt_tokens = True, tokens
            case Token(token, logprobs):
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


def run_images(
    driver: Driver,
    processor: Processor,
    requests: Sequence[ImageRequest],
    callback: Callback | None = None,
) -> ImageResult:
    """Generate all images of all requests together; they have one size.

    `callback` is called after every denoising step.
    """
    negatives = {
        request.negative_prompt: f"uncond {number}"
        for number, request in enumerate(requests)
        if "uncond" in request.sampling.guidance.branches()
    }
    shared = [
        keep_prompt(name, unconditional_prompt(processor.tokenizer, negative))
        for negative, name in negatives.items()
    ]
    previews = 0 if callback is None else None
    programs = [generate_images(processor, r, negatives, previews) for r in requests]
    collected = [_Images(request) for request in requests]
    for events in driver.run([*shared, *programs]):
        for number, event in events:
            collected[number - len(shared)].put(event)
        if callback is not None and any(isinstance(event, Preview) for _, event in events):
            callback(_progress(collected))
    tokenizer = processor.tokenizer
    return ImageResult(
        pixels=torch.stack([x for item in collected for x in item.in_order()]),
        thoughts=[
            tokenizer.decode(item.thought).strip() if item.request.think else None
            for item in collected
        ],
        seeds=[r.seed if r.noise is None else None for r in requests],
    )


class _Images:
    """Thought, previews and images of one request so far."""

    def __init__(self, request: ImageRequest) -> None:
        self.request = request
        self.thought: list[int] = []
        self.previews: dict[int, Preview] = {}
        self._images: dict[int, Tensor] = {}

    def put(self, event: Event) -> None:
        match event:
            case Token(token):
                self.thought.append(token)
            case Preview(index):
                self.previews[index] = event
            case ImageFinished(index, pixels):
                self._images[index] = pixels

    def in_order(self) -> list[Tensor]:
        return [self._images[index] for index in range(self.request.count)]


def _progress(collected: Sequence[_Images]) -> ImageProgress:
    previews = [item.previews[n] for item in collected for n in range(item.request.count)]
    return ImageProgress(
        max(preview.step for preview in previews),
        max(preview.steps for preview in previews),
        torch.stack([preview.pixels for preview in previews]),
    )


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
                case ImageFinished(_, pixels):
                    yield ImagePart(pixels)
