"""Fields and answers that chat and completions share: sampling, log-probabilities, usage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field

from neounify.config import TextSampling
from neounify.config.knobs import knob_doc
from neounify.config.sampling import MAX_LOGPROBS
from neounify.serve.http.fields import MAX_TEXT, Number, RequestFields, seeds_of
from neounify.serve.http.streaming import AnswerModel
from neounify.tasks.chat import ChatRequest, CompletionRequest
from neounify.tasks.events import Finished, TaskEvent, TextPiece, TokenLogProb, ToolCallPiece

Text = Annotated[str, Field(max_length=MAX_TEXT)]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
Alternatives = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Stop = Annotated[str, Field(max_length=1000)]

Request = TypeVar("Request", ChatRequest, CompletionRequest)
_LOG_PROB_BYTES = 60
"""About what one token takes in JSON."""
LEAST = -9999.0
"""The logarithm of a probability of 0, as JSON has no infinity."""


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


def _doc(knob: str) -> str:
    return knob_doc(TextSampling, knob)


class TextFields(RequestFields):
    """Fields that chat and completions share."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        (
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        )
    )
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "frequency_penalty": (0,),
        "ignore_eos": (False,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "min_tokens": (0,),
        "presence_penalty": (0,),
        "priority": (0,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "stop_token_ids": ([],),
        "typical_p": (1,),
        "use_beam_search": (False,),
    }

    model: str = Field("", max_length=200)
    n: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="Answers to the same prompt; answer i is drawn with seed + i."
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Number = Field(0.0, description=_doc("temperature"))
    top_p: Number = Field(1.0, description=_doc("top_p"))
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(
        0, description=f"{_doc('top_k')} Extension."
    )
    min_p: Number = Field(0.0, description=f"{_doc('min_p')} Extension.")
    repetition_penalty: Number = Field(1.0, description=f"{_doc('repetition_penalty')} Extension.")
    max_tokens: TokenCount | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = Field(default_factory=list)

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, *, seed: int | None, logprobs: int | None = None) -> TextSampling:
        """Settings of the token sampler. Raises RequestError for values out of range."""
        return TextSampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            logprobs=logprobs,
        )


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
        """About the bytes of its log-probabilities as JSON."""
        return _LOG_PROB_BYTES * sum(1 + len(token.top) for token in self.log_probs)


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
