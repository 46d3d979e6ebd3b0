"""What the HTTP server asks before and after the model: safety hooks, the mark, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import PIL.Image

from neounify.serve.http.hooks import FormatName
from neounify.serve.safety.hooks import Hooks
from neounify.serve.safety.provenance import encode_image
from neounify.serve.safety.watermark import Marker


class MarkingHooks:
    """Pictures leave with their provenance, and with an invisible mark if there is a marker."""

    def __init__(self, hooks: Hooks, marker: Marker | None = None) -> None:
        self._hooks, self._marker = hooks, marker

    def check_prompt(self, text: str, images: Sequence[PIL.Image.Image]) -> None:
        """Raises Refused."""
        self._hooks.check_prompt(text, images)

    def encode_image(
        self, image: PIL.Image.Image, format: FormatName, facts: Mapping[str, str]
    ) -> bytes:
        """Raises Refused for a picture that may not leave."""
        self._hooks.check_image(image)
        return encode_image(self._marker.mark(image) if self._marker else image, format, facts)
