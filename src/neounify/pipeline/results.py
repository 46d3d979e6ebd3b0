"""Results of the tasks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import PIL.Image
from jaxtyping import Float
from torch import Tensor

from neounify.decode.sampler import FinishReason, LogProbs
from neounify.deprecation import moved
from neounify.image.pixels import to_pil
from neounify.text.tools import ToolCall


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
    """Generated images, prompt by prompt.

    `pixels` [B, 3, H, W] float32 in about [-1, 1], not clamped; `thoughts` one text per
    prompt, None where the model was not asked to think; `seeds` one per prompt, None where
    the noise was given.
    """

    pixels: Float[Tensor, "b 3 h w"]
    thoughts: list[str | None]
    seeds: list[int | None]

    @cached_property
    def images(self) -> list[PIL.Image.Image]:
        return to_pil(self.pixels)


@dataclass(frozen=True)
class ImageProgress:
    """The state after one denoising step; `step` counts from 1 to `steps`."""

    step: int
    steps: int
    clean: Float[Tensor, "b 3 h w"]
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
    """A finished image of an interleaved answer; `pixels` [3, H, W] in about [-1, 1]."""

    pixels: Float[Tensor, "3 h w"]

    @cached_property
    def image(self) -> PIL.Image.Image:
        return to_pil(self.pixels[None])[0]


InterleavePart = TextPart | PreviewPart | ImagePart

__getattr__ = moved(
    __name__, __name__, {"PaintProgress": "ImageProgress", "PaintResult": "ImageResult"}
)
