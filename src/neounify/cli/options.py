"""Options that commands share: model, device, output, reporting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

MODEL, IMAGES, TEXT, FILES, BATCH, REPORT = (
    "Model",
    "Image generation",
    "Text generation",
    "Output",
    "Batch",
    "Reporting",
)
"""Headings under which `--help` groups the options of most commands."""


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """Which model."""

    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            envvar="NEOUNIFY_MODEL",
            metavar="FOLDER",
            help="Folder of the checkpoint: config.json, *.safetensors, tokenizer files.",
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """How a checkpoint's weights are read."""

    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Number format of the weights: float32, bfloat16 or float16. Default: the "
            "fastest exact one on this machine; convert keeps the stored one.",
            rich_help_panel=MODEL,
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:STRENGTH]",
            help="Merge a LoRA of any format, with a strength (default 1). May be repeated.",
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where a command computes."""

    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda|cuda:N",
            help="Where to compute. Default: a GPU if there is one.",
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ThreadOptions(DeviceOptions):
    """Where a command computes, and with how many threads."""

    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="CPU threads. Default: all cores; `serve` in one process leaves one for HTTP.",
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ColourOptions:
    """How the colours of input images are read."""

    colour_profiles: Annotated[
        bool,
        typer.Option(
            "--colour-profiles/--no-colour-profiles",
            help="Convert input images by their colour profile, or treat their values as sRGB, "
            "as the published code does.",
            rich_help_panel=MODEL,
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ColourOptions, ThreadOptions, WeightOptions, NamedModel):
    """Which model runs, and where."""

    memory: Annotated[
        str,
        typer.Option(
            metavar="all|stream",
            help="stream keeps only the active stream's weights in memory: slower, for models "
            "that do not fit.",
            rich_help_panel=MODEL,
        ),
    ] = "all"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What is shown."""

    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Only the result: no progress bars, no notes.",
            rich_help_panel=REPORT,
        ),
    ] = False
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the result as one line of JSON.", rich_help_panel=REPORT
        ),
    ] = False
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=REPORT),
    ] = False


@dataclass(frozen=True, kw_only=True)
class OverwriteOptions:
    """Whether existing files may be replaced."""

    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=FILES),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ImageFileOptions(OverwriteOptions):
    """How generated images are saved."""

    previews: Annotated[
        bool,
        typer.Option(
            "--previews",
            help="Also save a contact sheet with the predicted image of every step.",
            rich_help_panel=FILES,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class _ImageTarget:
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER|FILE.png",
            help="Where to save. Files in a folder are never overwritten: the second of a name "
            "gets the suffix -2.",
            rich_help_panel=FILES,
        ),
    ] = Path("outputs")


@dataclass(frozen=True, kw_only=True)
class _StoryTarget:
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Parent of the story's folder. The second story of a name gets the suffix -2.",
            rich_help_panel=FILES,
        ),
    ] = Path("outputs")


@dataclass(frozen=True, kw_only=True)
class ImageOutputOptions(ImageFileOptions, _ImageTarget):
    """Where generated images are saved."""


@dataclass(frozen=True, kw_only=True)
class StoryOutputOptions(ImageFileOptions, _StoryTarget):
    """Where stories are saved."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Prompts from a file."""

    input: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE.jsonl",
            help="Process a file instead: one JSON object per line with `prompt` and, optionally, "
            "`id`, `images` and any option by its name (`max_new_tokens`). Run the same command "
            "again to resume after an interruption. A line without a seed gets --seed + its "
            "line number - 1.",
            rich_help_panel=BATCH,
        ),
    ] = None
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Prompts processed at once, where their settings are equal.",
            rich_help_panel=BATCH,
        ),
    ] = 4
