"""Events of a task: pieces of its answer as they come, `Finished` last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PromptRead:
    """The prompt of a text answer has been read; a second request can begin from its cache."""

    prompt_tokens: int = 0


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
class ImageFinished:
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


TaskEvent = PromptRead | TextPiece | ToolCallPiece | Preview | ImageFinished | Finished
