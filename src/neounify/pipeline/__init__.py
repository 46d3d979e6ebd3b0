"""The tasks: chat, painting, editing, interleaved answers; what users and servers call."""

from neounify.pipeline.load import load
from neounify.pipeline.pipeline import Pipeline
from neounify.pipeline.results import (
    ChatResult,
    ImagePart,
    InterleavePart,
    PaintProgress,
    PaintResult,
    PreviewPart,
    TextPart,
)

__all__ = [
    "ChatResult",
    "ImagePart",
    "InterleavePart",
    "PaintProgress",
    "PaintResult",
    "Pipeline",
    "PreviewPart",
    "TextPart",
    "load",
]
