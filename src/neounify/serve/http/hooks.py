"""Where content checks and provenance marks are plugged in: before a request, after an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Literal, Protocol

import PIL.Image

FormatName = Literal["png", "jpeg", "webp"]
QUALITY = 95
"""Of jpeg and webp, on PIL's scale of 0 to 100."""


class HttpHooks(Protocol):
    """Called from worker threads, several at a time."""

    def check_prompt(self, text: str, images: Sequence[PIL.Image.Image]) -> None:
        """Raise Refused unless this may be answered; `text` is all that the caller wrote."""

    def encode_image(
        self, image: PIL.Image.Image, format: FormatName, facts: Mapping[str, str]
    ) -> bytes:
        """The file of a painted image or of a preview, checked and marked as its owner wants.

        `facts` say how it was made: model, task, seed, steps and so on, but not the prompt.
        Raises Refused for an image that may not leave the server.
        """


class PlainHooks:
    """Everything may be asked; images are written without metadata."""

    def check_prompt(self, text: str, images: Sequence[PIL.Image.Image]) -> None:
        """Allow it."""

    def encode_image(
        self, image: PIL.Image.Image, format: FormatName, facts: Mapping[str, str]
    ) -> bytes:
        file = BytesIO()
        image.save(file, format, quality=QUALITY)
        return file.getvalue()
