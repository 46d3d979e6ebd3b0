"""What a request in service gives back, and what may go wrong: the contract of engines and HTTP.

The HTTP layer and the engines depend on each other only through the protocol `Service`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from neounify.config import ModelConfig
from neounify.errors import ServiceError
from neounify.pipeline.chatting import ChatRequest, CompletionRequest
from neounify.pipeline.interleaving import InterleaveRequest
from neounify.tasks.requests import PaintRequest

ServiceRequest = ChatRequest | CompletionRequest | PaintRequest | InterleaveRequest


@dataclass(frozen=True)
class PromptRead:
    """The prompt of a text answer has been read; a second request can begin from its cache."""


@dataclass(frozen=True)
class TokenLogProb:
    """A token of an answer, the logarithm of its probability, and the likeliest in its place."""

    token: bytes
    log_prob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class TextPiece:
    """Text as soon as it is complete characters; `thought` for what stands in a thought.

    `log_probs` are of the tokens up to here that no earlier piece had, where they were asked for.
    """

    text: str
    thought: bool = False
    log_probs: tuple[TokenLogProb, ...] = ()


@dataclass(frozen=True)
class ToolCallPiece:
    """A whole call of a function; `arguments` are JSON, cut off where a limit ended the answer."""

    name: str
    arguments: str
    log_probs: tuple[TokenLogProb, ...] = ()


@dataclass(frozen=True, eq=False)
class Preview:
    """Image `index` of the answer after `step` of `steps`: its clean prediction, not clamped."""

    index: int
    step: int
    steps: int
    pixels: Float[Tensor, "3 h w"]


@dataclass(frozen=True, eq=False)
class Painted:
    """Image `index` of the answer, finished; about [-1, 1], float32 on the CPU, not clamped."""

    index: int
    pixels: Float[Tensor, "3 h w"]


@dataclass(frozen=True)
class Finished:
    """The last event of every answer that came to an end.

    `prompt_tokens` are those of the conditional prompt: `prompt_image_tokens` of them are its
    images', `cached_tokens` were known from earlier requests. `completion_tokens` are text,
    `reasoning_tokens` of them a thought; `image_tokens` were painted.
    """

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    image_tokens: int = 0
    prompt_image_tokens: int = 0
    reasoning_tokens: int = 0


ServiceEvent = PromptRead | TextPiece | ToolCallPiece | Preview | Painted | Finished


class Overloaded(ServiceError):
    """More requests than the limits allow; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(ServiceError):
    """The request ran out of the time it was given."""


class Draining(ServiceError):
    """The service is shutting down and takes no new requests."""


class Service(Protocol):
    """A service that answers many requests at once."""

    @property
    def config(self) -> ModelConfig:
        """Of the model that answers."""

    def check_together(self, requests: Sequence[ServiceRequest]) -> None:
        """RequestError if the limits can never admit all of these requests at the same time.

        ImageError for an image that is too large by itself.
        """

    def answer(
        self, request: ServiceRequest, *, previews: int = 0, deadline: float | None = None
    ) -> AsyncIterator[ServiceEvent]:
        """The events of one request; `Finished` comes last.

        `previews` is how many previews of each image are wanted at most, evenly over its steps
        (the finished image not counted). `deadline` is in seconds from now. Closing the iterator
        frees the request's work within one step. Raises PromptError, ImageError and RequestError
        for requests the model cannot answer, and ServiceError.
        """
