"""POST /v1/completions: texts that are continued as they stand."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from neounify.serve.http.connections import BoundedRoute
from neounify.serve.http.context import Context, Shared
from neounify.serve.http.errors import bad_request
from neounify.serve.http.streaming import (
    DONE,
    EVENTS,
    AnswerModel,
    json_response,
    sse,
    start_stream,
)
from neounify.serve.http.text_answers import (
    Alternatives,
    Choice,
    Text,
    TextFields,
    TextUsage,
    for_each_answer,
    of_completion,
    text_usage,
)
from neounify.tasks.chat import CompletionRequest
from neounify.tasks.events import Finished, TaskEvent, TextPiece, TokenLogProb

DEFAULT_TOKENS = 16
ANSWERS_PER_N = 10
"""Maximum answers to a list of prompts, as a multiple of the maximum `n` of one prompt."""

TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, max_length=1_000_000)
]
router = APIRouter(tags=["completions"], route_class=BoundedRoute)


class CompletionBody(TextFields):
    """Texts to continue, without the form of a conversation."""

    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {**TextFields.only, "suffix": ("",)}

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    ) = Field(description="A text or token ids, or a list of them.")
    echo: bool = Field(False, description="Return the prompt in front of its continuation.")
    logprobs: Alternatives | None = Field(
        None, description="That many of the likeliest tokens beside each one."
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description=f"{DEFAULT_TOKENS} where nothing is said."
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
async def completions(body: CompletionBody, context: Shared) -> Response:
    """Text or token ids in, the text that follows out. Typed special tokens are characters."""
    answer = _CompletionAnswer(body, await _read(body, context), context)
    if body.stream:
        return await start_stream(answer.chunks())
    return await answer.whole()


async def _read(body: CompletionBody, context: Context) -> list[Sequence[CompletionRequest]]:
    """The requests of every prompt. Raises ApiError, PromptError, RequestError and Refused."""
    context.check_model(body.model)
    if body.echo and body.logprobs is not None:
        raise bad_request(
            "echo: not supported together with logprobs, as those of the prompt are not computed",
            "echo",
            "unsupported",
        )
    prompts = body.prompts
    answers = len(prompts) * body.n
    max_answers = context.settings.limits.n * ANSWERS_PER_N
    context.check_n(body.n)
    if answers > max_answers:
        raise bad_request(
            f"prompt: {answers} answers are over this server's {max_answers}", "prompt"
        )
    await context.check_prompt((p for p in prompts if isinstance(p, str)), ())
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    context.check_tokens(max_tokens, "max_tokens")
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


class _CompletionAnswer:
    """The continuations of one body in progress; those of the first prompt come first."""

    def __init__(
        self, body: CompletionBody, groups: list[Sequence[CompletionRequest]], context: Context
    ) -> None:
        self._body, self._groups, self._context = body, groups, context
        self._choices = [_Choice() for group in groups for _ in group]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.settings.model_name,
        }

    async def whole(self) -> JSONResponse:
        """The `text_completion`."""
        async with aclosing(self._events()) as events:
            async for index, event in events:
                self._choices[index].add(event)
        return await json_response(self._whole, sum(choice.size for choice in self._choices))

    def _whole(self) -> dict[str, Any]:
        choices = [
            self._choice(
                index,
                choice.text,
                choice.log_probs,
                offset=0,
                finish_reason=choice.finished.finish_reason,
            )
            for index, choice in enumerate(self._choices)
        ]
        return self._head | {"choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The pieces as server-sent events, ended by [DONE]."""
        async with aclosing(self._events()) as events:
            async for index, event in events:
                choice = self._choices[index]
                offset = len(choice.text)
                choice.add(event)
                if isinstance(event, TextPiece):
                    piece = self._choice(index, event.text, event.log_probs, offset=offset)
                elif isinstance(event, Finished):
                    reason = event.finish_reason
                    piece = self._choice(index, "", (), offset=offset, finish_reason=reason)
                else:
                    continue
                yield self._chunk([piece])
        if self._body.stream_options.include_usage:
            yield sse(self._head | {"choices": [], "usage": self._usage()})
        yield DONE

    def _events(self) -> AsyncGenerator[tuple[int, TaskEvent]]:
        return self._context.answers(self._groups, self._body)

    def _choice(
        self,
        index: int,
        text: str,
        log_probs: Sequence[TokenLogProb],
        *,
        offset: int,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        has_logprobs = self._body.logprobs is not None
        return {
            "index": index,
            "text": text,
            "finish_reason": finish_reason,
            "logprobs": of_completion(log_probs, offset) if has_logprobs else None,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": None} if self._body.stream_options.include_usage else {}
        return sse(self._head | {"choices": choices} | usage)

    def _usage(self) -> dict[str, Any]:
        finished = [choice.finished for choice in self._choices]
        return text_usage(finished, finished[:: self._body.n])


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
        """About the bytes of the continuation as JSON."""
        return super().size + len(self.text)
