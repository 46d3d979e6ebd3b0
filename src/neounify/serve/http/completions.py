"""POST /v1/completions; choices, log-probabilities and usage, which chat completions share."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from neounify.config.sampling import MAX_LOGPROBS
from neounify.serve.http.connections import BoundedRoute
from neounify.serve.http.errors import bad_request
from neounify.serve.http.fields import AnswerModel, LimitedText, TextFields, seeds_of
from neounify.serve.http.serving import (
    DONE,
    EVENTS,
    ServerState,
    State,
    json_response,
    sse,
    sse_of,
    start_stream,
)
from neounify.serve.service import ServiceRequest
from neounify.tasks.chat import COMPLETION_TOKENS, ChatRequest, CompletionRequest
from neounify.tasks.program import (
    Finished,
    ImageFinished,
    Preview,
    TaskEvent,
    TextPiece,
    TokenLogProb,
    ToolCallPiece,
)

ANSWERS_PER_N = 10
"""Maximum answers to a list of prompts, as a multiple of the maximum `n` of one prompt."""
LEAST = -9999.0
"""The logarithm of a probability of 0, as JSON has no infinity."""
_LOG_PROB_BYTES = 60
"""Approximate bytes of one token in JSON."""

Alternatives = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, max_length=1_000_000)
]
Request = TypeVar("Request", ChatRequest, CompletionRequest)
Body = TypeVar("Body", bound=TextFields)
AnyChoice = TypeVar("AnyChoice", bound="Choice")
router = APIRouter(tags=["completions"], route_class=BoundedRoute)


# --- shared with chat completions ---


class TopLogProb(AnswerModel):
    """A token that could have been sampled, with the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class PromptTokens(AnswerModel):
    """Tokens of the prompt: those cached from earlier requests, and those of images."""

    audio_tokens: Literal[0]
    cached_tokens: int
    image_tokens: int


class CompletionTokens(AnswerModel):
    """Tokens of the answer: those of a thought; besides, those of generated images."""

    accepted_prediction_tokens: Literal[0]
    audio_tokens: Literal[0]
    image_tokens: int
    reasoning_tokens: int
    rejected_prediction_tokens: Literal[0]


class TextUsage(AnswerModel):
    """Tokens of text and of input images; generated images are not in the totals."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class Choice:
    """One of the answers to a request in progress."""

    def __init__(self) -> None:
        self.log_probs: list[TokenLogProb] = []
        self._finished: Finished | None = None

    def count(self, event: TaskEvent) -> None:
        """Take in the part of an event that the rest of a stream depends on."""
        if isinstance(event, Finished):
            self._finished = event

    def add(self, event: TaskEvent) -> None:
        """Take in an event for an answer that is sent as a whole."""
        self.count(event)
        if isinstance(event, TextPiece | ToolCallPiece):
            self.log_probs += event.log_probs

    @property
    def finished(self) -> Finished:
        """The last event of the answer."""
        if self._finished is None:
            raise RuntimeError("the engines ended an answer without Finished")
        return self._finished

    @property
    def size(self) -> int:
        """Approximate bytes of its log-probabilities as JSON."""
        return _LOG_PROB_BYTES * sum(1 + len(token.top) for token in self.log_probs)


class TextAnswer(Generic[Body, AnyChoice]):
    """The answers to one body in progress, sent as one JSON object or as a stream of chunks.

    `groups` are the requests of each prompt; the answers are numbered in their order.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self,
        body: Body,
        groups: Sequence[Sequence[ServiceRequest]],
        state: ServerState,
        new_choice: Callable[[], AnyChoice],
    ) -> None:
        self.body, self.groups, self.state = body, groups, state
        self.choices = [new_choice() for group in groups for _ in group]
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": state.config.model_name,
        }

    async def add(self, choice: AnyChoice, event: TaskEvent) -> None:
        """Take in an event for an answer that is sent as a whole."""
        choice.add(event)

    def choice(self, index: int, choice: AnyChoice) -> dict[str, Any]:
        """A choice of an answer that is sent as a whole."""
        raise NotImplementedError

    async def chunks(
        self, index: int, choice: AnyChoice, event: TaskEvent
    ) -> Sequence[dict[str, Any]]:
        """The choices, one for each chunk, that an event becomes in a stream."""
        raise NotImplementedError

    async def response(self) -> Response:
        """The response that the body asks for."""
        return await (start_stream(self._stream()) if self.body.stream else self._whole())

    async def _whole(self) -> JSONResponse:
        async with aclosing(self._events()) as events:
            async for index, event in events:
                await self.add(self.choices[index], event)
        return await json_response(self._content, sum(choice.size for choice in self.choices))

    def _content(self) -> dict[str, Any]:
        choices = [self.choice(index, choice) for index, choice in enumerate(self.choices)]
        answer = {"object": self.whole_object, "choices": choices, "usage": self._usage()}
        return self._head | answer

    async def _stream(self) -> AsyncGenerator[bytes]:
        head = self._head | {"object": self.chunk_object}
        has_usage = self.body.stream_options.include_usage
        usage = {"usage": None} if has_usage else {}
        async with aclosing(self._events()) as events:
            async for index, event in events:
                size = event.pixels.nbytes if isinstance(event, Preview | ImageFinished) else 0
                for choice in await self.chunks(index, self.choices[index], event):
                    yield await sse_of(partial(dict, head, choices=[choice], **usage), size)
        if has_usage:
            yield sse(head | {"choices": [], "usage": self._usage()})
        yield DONE

    def _events(self) -> AsyncGenerator[tuple[int, TaskEvent]]:
        return self.state.answers(self.groups, self.body)

    def _usage(self) -> dict[str, Any]:
        finished = [choice.finished for choice in self.choices]
        return text_usage(finished, finished[:: self.body.n])


def for_each_answer(request: Request, n: int) -> Sequence[Request]:
    """The requests of `n` answers with consecutive seeds; without a seed all are random."""
    seed = request.sampling.seed
    if seed is None:
        return [request] * n
    return [
        replace(request, sampling=replace(request.sampling, seed=answer_seed))
        for answer_seed in seeds_of(seed, n)
    ]


def of_chat(tokens: Iterable[TokenLogProb]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat completion."""
    return {
        "content": [
            _entry(token.token, token.log_prob)
            | {"top_logprobs": [_entry(other, value) for other, value in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def of_completion(tokens: Iterable[TokenLogProb], offset: int) -> dict[str, Any]:
    """The `logprobs` of a choice of a text completion; its text begins at `offset` characters.

    The sampled token is among the alternatives, as in OpenAI's answers.
    """
    logprobs: dict[str, Any] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token in tokens:
        name, value = _name(token.token), max(token.log_prob, LEAST)
        top = {_name(other): max(value, LEAST) for other, value in token.top}
        logprobs["tokens"].append(name)
        logprobs["token_logprobs"].append(value)
        logprobs["top_logprobs"].append({name: value} | top)
        logprobs["text_offset"].append(offset)
        offset += len(_text(token.token))
    return logprobs


def _entry(token: bytes, log_prob: float) -> dict[str, Any]:
    return {"token": _text(token), "logprob": max(log_prob, LEAST), "bytes": list(token)}


def _name(token: bytes) -> str:
    """The text of a token; its bytes where it is no whole characters, so that names differ."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")


def text_usage(answers: Sequence[Finished], prompts: Sequence[Finished]) -> dict[str, Any]:
    """OpenAI's usage of all `answers`; `prompts` has one answer per prompt, which counts once.

    Tokens of generated images are not in the totals.
    """
    prompt_tokens = sum(answer.prompt_tokens for answer in prompts)
    completion_tokens = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "audio_tokens": 0,
            "cached_tokens": sum(answer.cached_tokens for answer in prompts),
            "image_tokens": sum(answer.prompt_image_tokens for answer in prompts),
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "audio_tokens": 0,
            "image_tokens": sum(answer.image_tokens for answer in answers),
            "reasoning_tokens": sum(answer.reasoning_tokens for answer in answers),
            "rejected_prediction_tokens": 0,
        },
    }


# --- completions ---


class CompletionBody(TextFields):
    """Texts to continue, without the form of a conversation."""

    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {**TextFields.only, "suffix": ("",)}

    prompt: (
        LimitedText
        | Annotated[list[LimitedText], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    ) = Field(description="A text or token ids, or a list of them.")
    echo: bool = Field(False, description="Return the prompt in front of its continuation.")
    logprobs: Alternatives | None = Field(
        None, description="That many of the likeliest tokens beside each one."
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description=f"{COMPLETION_TOKENS} where nothing is said."
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class CompletionLogProbs(AnswerModel):
    """Tokens of a text, the logarithms of their probabilities, and the likeliest in each place."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(AnswerModel):
    """One continuation; those of the first prompt come first."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogProbs | None


class Completion(AnswerModel):
    """Texts that continue prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TextUsage


@router.post(
    "/v1/completions",
    summary="Continue texts",
    response_class=JSONResponse,
    responses={200: {"model": Completion, "content": EVENTS}},
)
async def completions(body: CompletionBody, state: State) -> Response:
    """Text or token ids in, the text that follows out. Typed special tokens are characters."""
    return await _CompletionAnswer(body, await _read(body, state), state, _Choice).response()


async def _read(body: CompletionBody, state: ServerState) -> list[Sequence[CompletionRequest]]:
    """The requests of every prompt. Raises ApiError, PromptError, RequestError and Refused."""
    state.check_model(body.model)
    if body.echo and body.logprobs is not None:
        raise bad_request(
            "echo: not supported together with logprobs, as those of the prompt are not computed",
            "echo",
            "unsupported",
        )
    prompts = body.prompts
    answers = len(prompts) * body.n
    max_answers = state.config.limits.n * ANSWERS_PER_N
    state.check_n(body.n)
    if answers > max_answers:
        raise bad_request(
            f"prompt: {answers} answers are over this server's {max_answers}", "prompt"
        )
    await state.check_prompt((p for p in prompts if isinstance(p, str)), ())
    max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    state.check_tokens(max_tokens, "max_tokens")
    sampling = body.sampling(seed=body.seed, logprobs=body.logprobs)
    return [
        for_each_answer(
            CompletionRequest(
                prompt=prompt,
                max_new_tokens=max_tokens,
                stop=body.stops,
                echo=body.echo,
                sampling=sampling,
            ),
            body.n,
        )
        for prompt in prompts
    ]


class _Choice(Choice):
    """One continuation in progress."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def add(self, event: TaskEvent) -> None:
        super().add(event)
        if isinstance(event, TextPiece):
            self.text += event.text

    @property
    def size(self) -> int:
        """Approximate bytes of the continuation as JSON."""
        return super().size + len(self.text)


class _CompletionAnswer(TextAnswer[CompletionBody, _Choice]):
    """The continuations of one body in progress; those of the first prompt come first."""

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        reason = choice.finished.finish_reason
        return self._part(index, choice.text, choice.log_probs, 0, reason)

    async def chunks(self, index: int, choice: _Choice, event: TaskEvent) -> list[dict[str, Any]]:
        offset = len(choice.text)
        choice.add(event)
        if isinstance(event, TextPiece):
            return [self._part(index, event.text, event.log_probs, offset, None)]
        if isinstance(event, Finished):
            return [self._part(index, "", (), offset, event.finish_reason)]
        return []

    def _part(
        self,
        index: int,
        text: str,
        log_probs: Sequence[TokenLogProb],
        offset: int,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        """A text of choice `index` that begins at `offset` characters."""
        has_logprobs = self.body.logprobs is not None
        return {
            "index": index,
            "text": text,
            "finish_reason": finish_reason,
            "logprobs": of_completion(log_probs, offset) if has_logprobs else None,
        }
