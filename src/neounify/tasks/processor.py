"""Processor: requests to model input, with tokenizer and config but no weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import PIL.Image
import torch
from torch import Tensor

from neounify.config import ModelConfig
from neounify.grammar import Vocabulary
from neounify.image.pixels import prepare_image
from neounify.text.tokenizer import Tokenizer


class Processor:
    """Prepares prompts and images for one model; `dtype` is that of prepared images."""

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, system_message: str, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.system_message = system_message
        self.dtype = dtype

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of grammars; processes that sample tokens must hold one too."""
        return Vocabulary.of(self.tokenizer)

    def token(self, name: str) -> int:
        return self.tokenizer.id(name)

    def prepare(
        self, images: Sequence[PIL.Image.Image], min_pixels: int, max_pixels: int
    ) -> list[Tensor]:
        """Images [3, height, width] for the understanding stream, normalised.

        Each is resized to an area from `min_pixels` to `max_pixels`.
        """
        return [
            prepare_image(
                image,
                multiple=self.config.token_size,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                dtype=self.dtype,
            )
            for image in images
        ]
