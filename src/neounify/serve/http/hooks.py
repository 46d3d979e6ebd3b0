"""What the server asks before and after the model: content checks, provenance, the mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import PIL.Image

from neounify.provenance.metadata import Format, encode_image
from neounify.serve.safety.hooks import Hooks

if TYPE_CHECKING:
    from neounify.provenance.watermark import Marker


class HttpHooks(Protocol):
    """Called from worker threads, several at a time."""

    def check_prompt(self, text: str, images: Sequence[PIL.Image.Image]) -> None:
        """Raise Refused unless this may be answered; `text` is all that the caller wrote."""

    def encode_image(
        self, image: PIL.Image.Image, format: Format, facts: Mapping[str, str]
    ) -> bytes:
        """The file of a painted image or of a preview, checked and marked as its owner wants.

        `facts` say how it was made: model, task, seed, steps and so on; prompts only where
        `HttpSettings.metadata_prompts` wants them.
        Raises Refused for an image that may not leave the server.
        """


class MarkingHooks:
    """Pictures leave with their provenance, and with an invisible mark if there is a marker."""

    def __init__(self, hooks: Hooks | None = None, marker: Marker | None = None) -> None:
        self._hooks, self._marker = hooks or Hooks(), marker

    def check_prompt(self, text: str, images: Sequence[PIL.Image.Image]) -> None:
        """Raises Refused."""
        self._hooks.check_prompt(text, images)

    def encode_image(
        self, image: PIL.Image.Image, format: Format, facts: Mapping[str, str]
    ) -> bytes:
        """Raises Refused for a picture that may not leave."""
        self._hooks.check_image(image)
        return encode_image(self._marker.mark(image) if self._marker else image, format, facts)
