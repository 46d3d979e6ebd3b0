"""Understanding: questions about pictures and text, answered and streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import PIL.Image
import torch

from neounify.decode.loop import Generation
from neounify.decode.sampling import SamplingSettings, SamplingState
from neounify.errors import RequestError
from neounify.pipeline.answer import AnswerText
from neounify.pipeline.engine import Engine
from neounify.pipeline.front import Front
from neounify.pipeline.messages import Conversation, read_conversation
from neounify.pipeline.results import ChatResult
from neounify.text.special import IM_END
from neounify.text.template import Message, chat_prompt, continues_answer


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One conversation to continue; `images` are those of `messages` in order.

    Where the last message is the assistant's, the answer goes on from it (prefill).
    """

    messages: Sequence[Message]
    images: Sequence[PIL.Image.Image] = ()
    system: str = ""
    think: bool = False
    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


class ChatOptions(TypedDict, total=False):
    """The keyword arguments of `make_chat_request`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: Sequence[str]
    system: str
    think: bool
    seed: int | None


def make_chat_request(
    prompt: Conversation,
    images: Sequence[PIL.Image.Image],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    system: str = "",
    think: bool = False,
    seed: int | None = None,
    colour_profiles: bool = True,
) -> ChatRequest:
    """What a caller wrote, read and checked."""
    messages, pictures = read_conversation(prompt, images, colour_profiles=colour_profiles)
    return ChatRequest(
        messages=messages,
        images=pictures,
        system=system,
        think=think,
        max_new_tokens=max_new_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        sampling=SamplingSettings(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
    )


def chat_images(front: Front, request: ChatRequest) -> list[torch.Tensor]:
    """The pictures of a conversation, sized and normalised."""
    own = front.config.sampling
    return front.prepare(request.images, own.chat_min_pixels, own.chat_max_pixels)


def answer_text(front: Front, request: ChatRequest) -> AnswerText:
    """What turns the tokens of the answer into its text."""
    begun = continues_answer(request.messages) and bool(request.messages[-1].text)
    return AnswerText(front.tokenizer.stream(), request.stop, continues=begun)


class ChatRun:
    """Answers being written to several requests at once.

    Iterating yields (number of the request, piece of text); afterwards `results` holds
    the whole answers.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[ChatRequest], cancel: threading.Event | None
    ) -> None:
        self._engine = engine
        self._cancel = cancel
        self._texts = [answer_text(engine, r) for r in requests]
        prompts = [
            chat_prompt(engine.tokenizer, r.messages, system=r.system, think=r.think)
            for r in requests
        ]
        prefixes = engine.read(prompts, [chat_images(engine, r) for r in requests])
        self._hidden = torch.stack([p.hidden for p in prefixes])
        self._lengths = [p.cache.length for p in prefixes]
        end = frozenset((engine.token(IM_END),))
        self._generations = [
            Generation(p.cache, SamplingState(r.sampling, p.context), end, r.max_new_tokens)
            for p, r in zip(prefixes, requests, strict=True)
        ]
        self._pieces: list[list[str]] = [[] for _ in requests]

    def finish(self) -> list[ChatResult]:
        """Write all answers to their ends."""
        for _ in self:
            pass
        return self.results

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for taken in self._engine.write(self._generations, self._hidden, self._cancel):
            for number, token in taken:
                text = self._texts[number]
                piece = text.put(token)
                if text.stopped:
                    self._generations[number].stop()
                if piece:
                    self._pieces[number].append(piece)
                    yield number, piece
        for number, text in enumerate(self._texts):
            if piece := text.flush():
                self._pieces[number].append(piece)
                yield number, piece

    @property
    def results(self) -> list[ChatResult]:
        return [
            ChatResult("".join(pieces), tuple(g.ids), g.finish_reason or "stop", length)
            for pieces, g, length in zip(
                self._pieces, self._generations, self._lengths, strict=True
            )
        ]


class ChatStream:
    """One answer as it is written: iterate for pieces of text, then read `result`."""

    def __init__(self, run: ChatRun) -> None:
        self._run = run
        self._iterator = iter(run)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._iterator)[1]

    @property
    def result(self) -> ChatResult:
        """What was answered so far; all of it once the iteration has ended."""
        return self._run.results[0]
