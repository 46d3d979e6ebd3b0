"""Every option of every command, in groups; None leaves a value to the checkpoint."""

from neounify.cli.options.files import (
    BatchOptions,
    OverwriteOptions,
    PaintedFileOptions,
    PictureOutputOptions,
    ReportOptions,
    StoryOutputOptions,
)
from neounify.cli.options.images import (
    EditOptions,
    GenerateOptions,
    ImageGuidanceOptions,
    SamplingOptions,
    parse_interval,
    parse_size,
)
from neounify.cli.options.model import (
    ColourOptions,
    DeviceOptions,
    ModelOptions,
    NamedModel,
    ThreadOptions,
    WeightOptions,
)
from neounify.cli.options.panels import BATCH, FILES, MODEL, PAINTING, REPORT, TEXT
from neounify.cli.options.text import ChatOptions, StoryOptions, TextOptions

__all__ = [
    "BATCH",
    "FILES",
    "MODEL",
    "PAINTING",
    "REPORT",
    "TEXT",
    "BatchOptions",
    "ChatOptions",
    "ColourOptions",
    "DeviceOptions",
    "EditOptions",
    "GenerateOptions",
    "ImageGuidanceOptions",
    "ModelOptions",
    "NamedModel",
    "OverwriteOptions",
    "PaintedFileOptions",
    "PictureOutputOptions",
    "ReportOptions",
    "SamplingOptions",
    "StoryOptions",
    "StoryOutputOptions",
    "TextOptions",
    "ThreadOptions",
    "WeightOptions",
    "parse_interval",
    "parse_size",
]
