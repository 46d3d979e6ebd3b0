"""Events of a task: pieces of its answer as they are ready, `Finished` last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PromptRead:
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
    pixels: Float[Tensor, "3 h w"]


@dataclass(frozen=True, eq=False)
class ImageFinished:
    """Finished image `index` of the answer; about [-1, 1], float32 on the CPU, not clamped."""

    index: int
    pixels: Float[Tensor, "3 h w"]


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


TaskEvent = PromptRead | TextPiece | ToolCallPiece | Preview | ImageFinished | Finished
