"""`neounify convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.models import resolve_model
from neounify.cli.options import FILES, OverwriteOptions, ReportOptions, WeightOptions


def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    weights: WeightOptions,
    max_shard_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Largest weight file, as 5GB or 500MB.",
            rich_help_panel=FILES,
        ),
    ] = "5GB",
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Write a model anew: in another number format, with LoRA merged, in other file sizes.

    OUT has the published layout and can be used wherever MODEL can. All weights are looked
    through; damaged ones (NaN) are refused.

    \b
      neounify convert FOLDER smaller --dtype bfloat16
      neounify convert FOLDER fast --lora distilled.safetensors:0.8
    """
    folder = resolve_model(model)
    from neounify.cli.converting import convert_model

    convert_model(folder, out, weights, max_shard_size, overwrite.overwrite, report)
