"""Options of the model: which one, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.options.panels import MODEL


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
            "fastest that is exact on this machine; convert keeps the stored one.",
            rich_help_panel=MODEL,
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:STRENGTH]",
            help="Merge a LoRA of any form, with a strength (1 if not given). May be repeated.",
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
            help="CPU threads. Default: all cores; a server in one process leaves one core to "
            "HTTP.",
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
