"""User-facing tasks (chat, generation, editing, interleaved answers) and `load`."""

from neounify.deprecation import moved
from neounify.pipeline.loading import load
from neounify.pipeline.pipeline import Pipeline
from neounify.pipeline.results import (
    ChatResult,
    ImagePart,
    ImageProgress,
    ImageResult,
    InterleavePart,
    PreviewPart,
    TextPart,
)

__all__ = [
    "ChatResult",
    "ImagePart",
    "ImageProgress",
    "ImageResult",
    "InterleavePart",
    "Pipeline",
    "PreviewPart",
    "TextPart",
    "load",
]

__getattr__ = moved(
    __name__, __name__, {"PaintProgress": "ImageProgress", "PaintResult": "ImageResult"}
)
