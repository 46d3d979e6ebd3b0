"""Understanding: questions about pictures and text, answered and streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

import PIL.Image
import torch

from neounify.config import TextSampling
from neounify.decode.loop import Generation
from neounify.decode.sampling import SamplingState
from neounify.errors import PromptError, RequestError
from neounify.grammar import calls_grammar, json_grammar
from neounify.pipeline.engine import Engine
from neounify.pipeline.results import ChatResult
from neounify.tasks.answer import AnswerText, check_stop
from neounify.tasks.conversation import Conversation, read_conversation
from neounify.tasks.processor import Front
from neounify.text.message import Message
from neounify.text.special import IM_END
from neounify.text.template import Prompt, chat_prompt, continues_answer
from neounify.text.tools import Tool, ToolCall, ToolCallReader, ToolUse, read_tool


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One conversation to continue; `images` are those of `messages` in order.

    Where the last message is the assistant's, the answer goes on from it (prefill).
    `response_format` is a JSON schema that the answer follows, None for plain text.
    """

    messages: Sequence[Message]
    images: Sequence[PIL.Image.Image] = ()
    system: str = ""
    think: bool = False
    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    sampling: TextSampling = field(default_factory=TextSampling)
    tool_use: ToolUse = field(default_factory=ToolUse)
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}",
                param="max_new_tokens",
            )
        check_stop(self.stop)
        if self.response_format is not None and self.tool_use.forced:
            raise RequestError(
                "response_format: the answer must be a call of a tool, so it has no other format",
                param="response_format",
            )
        constrained = self.response_format is not None or bool(self.tool_use.forced)
        if constrained and continues_answer(self.messages):
            name = "tool_choice" if self.tool_use.forced else "response_format"
            raise RequestError(
                f"{name}: an answer that the last message begins cannot be held to a form; "
                "leave that message out",
                param=name,
            )


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A text or token ids to continue as they stand, without the form of a conversation.

    With `echo` the prompt comes in front of what follows it.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int = 16
    stop: Sequence[str] = ()
    echo: bool = False
    sampling: TextSampling = field(default_factory=TextSampling)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise RequestError(
                f"max_new_tokens must be at least 0, got {self.max_new_tokens}",
                param="max_new_tokens",
            )
        if not self.prompt:
            raise PromptError(
                "prompt: there is nothing to continue, the prompt is empty", param="prompt"
            )
        check_stop(self.stop)

    def ids(self, front: Front) -> tuple[int, ...]:
        """The prompt's ids; special tokens typed in a text stay characters.

        Raises PromptError for what is no text, and for ids that the tokenizer does not have.
        """
        if isinstance(self.prompt, str):
            return tuple(front.tokenizer.encode(self.prompt))
        last = front.tokenizer.vocab_size - 1
        for token in self.prompt:
            if not 0 <= token <= last:
                raise PromptError(f"prompt: token ids are 0 to {last}, got {token}", param="prompt")
        return tuple(self.prompt)


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
    logprobs: int | None
    tools: Sequence[Tool | Mapping[str, Any]]
    tool_choice: Literal["auto", "none", "required"]
    response_format: Mapping[str, Any] | None


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
    logprobs: int | None = None,
    colour_profiles: bool = True,
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    tool_choice: Literal["auto", "none", "required"] = "auto",
    response_format: Mapping[str, Any] | None = None,
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
        sampling=TextSampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            logprobs=logprobs,
        ),
        tool_use=ToolUse(tools=tuple(map(read_tool, tools)), choice=tool_choice),
        response_format=response_format,
    )


def prompt_of(front: Front, request: ChatRequest) -> Prompt:
    """The prompt of a conversation. Raises PromptError."""
    return chat_prompt(
        front.tokenizer,
        request.messages,
        system=request.system,
        think=request.think,
        tools=request.tool_use.offered,
    )


def constrained(front: Front, request: ChatRequest) -> TextSampling:
    """How to draw the answer: by its schema, or as calls of tools, where that is asked for.

    Raises RequestError for a schema that cannot be followed.
    """
    use = request.tool_use
    if use.forced:
        grammar = calls_grammar(
            front.vocabulary,
            use.forced,
            parallel=use.parallel and use.name is None,
            thinks=request.think,
        )
    elif request.response_format is not None:
        grammar = json_grammar(
            front.vocabulary,
            request.response_format,
            what="response_format",
            tools=use.offered,
            thinks=request.think,
        )
    else:
        return request.sampling
    return replace(request.sampling, constraint=grammar)


def call_reader(request: ChatRequest) -> ToolCallReader | None:
    """What finds calls in the text of the answer, where there may be some."""
    use = request.tool_use
    return ToolCallReader(forced=bool(use.forced)) if use.offered else None


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
        self._answers = [_Answer(engine, r) for r in requests]
        samplings = [constrained(engine, r) for r in requests]
        prompts = [prompt_of(engine, r) for r in requests]
        prefixes = engine.read(prompts, [chat_images(engine, r) for r in requests])
        self._hidden = torch.stack([p.hidden for p in prefixes])
        self._lengths = [p.cache.length for p in prefixes]
        end = frozenset((engine.token(IM_END),))
        self._generations = [
            Generation(p.cache, SamplingState(sampling, p.context), end, r.max_new_tokens)
            for p, r, sampling in zip(prefixes, requests, samplings, strict=True)
        ]

    def finish(self) -> list[ChatResult]:
        """Write all answers to their ends."""
        for _ in self:
            pass
        return self.results

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for taken in self._engine.write(self._generations, self._hidden, self._cancel):
            for number, token in taken:
                answer = self._answers[number]
                piece = answer.put(token)
                if answer.stopped:
                    self._generations[number].stop()
                if piece:
                    yield number, piece
        for number, answer in enumerate(self._answers):
            if piece := answer.flush():
                yield number, piece

    @property
    def results(self) -> list[ChatResult]:
        return [
            ChatResult(
                "".join(answer.pieces),
                tuple(g.ids),
                g.finish_reason or "stop",
                length,
                tuple(answer.calls),
                tuple(g.logprobs),
            )
            for answer, g, length in zip(
                self._answers, self._generations, self._lengths, strict=True
            )
        ]


class _Answer:
    """The pieces of text of one answer so far, and the calls in it."""

    def __init__(self, front: Front, request: ChatRequest) -> None:
        self._text = answer_text(front, request)
        self._reader = call_reader(request)
        self.pieces: list[str] = []
        self.calls: list[ToolCall] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._text.stopped

    def put(self, token: int) -> str:
        """Add a token; the text that can be shown now."""
        text = self._text.put(token)
        return self._keep([text] if self._reader is None else self._reader.put(text))

    def flush(self) -> str:
        """The rest of the text."""
        text = self._text.flush()
        if self._reader is None:
            return self._keep([text])
        return self._keep([*self._reader.put(text), *self._reader.flush()])

    def _keep(self, items: Sequence[str | ToolCall]) -> str:
        self.calls += [item for item in items if isinstance(item, ToolCall)]
        piece = "".join(item for item in items if isinstance(item, str))
        if piece:
            self.pieces.append(piece)
        return piece


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
