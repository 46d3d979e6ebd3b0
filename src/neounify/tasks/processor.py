"""What turns requests into model input: tokenizer and config, but no weights."""

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
    """Prompts and pictures as one model wants them; `dtype` is that of its weights."""

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, system_message: str, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.system_message = system_message
        self.dtype = dtype

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What grammars are made for. Where tokens are drawn, one must be held too."""
        return Vocabulary.of(self.tokenizer)

    def token(self, name: str) -> int:
        return self.tokenizer.id(name)

    def prepare(
        self, images: Sequence[PIL.Image.Image], min_pixels: int, max_pixels: int
    ) -> list[Tensor]:
        """Pictures for the understanding stream: sized by the bounds on their area, normalised."""
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
