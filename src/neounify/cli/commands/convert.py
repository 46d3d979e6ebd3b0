"""`neounify convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.models import resolve_model
from neounify.cli.options import FILES, OverwriteOptions, ReportOptions, WeightOptions
from neounify.runtime import lasting_imports


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
    lora_form: Annotated[
        str | None,
        typer.Option(
            metavar="peft|published",
            help="Write the --lora alone in this form instead of a model: PEFT's folder, or one "
            "file as the published models have it.",
            rich_help_panel=FILES,
        ),
    ] = None,
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Write a model anew: in another number format, with LoRA merged, in other file sizes.

    OUT has the published layout and can be used wherever MODEL can. All weights are looked
    through; damaged ones (NaN) are refused.

    With --lora-form, OUT is the LoRA, written anew for the model MODEL: of files of any other
    form, and of several in one.

    \b
      neounify convert FOLDER smaller --dtype bfloat16
      neounify convert FOLDER fast --lora distilled.safetensors:0.8
      neounify convert FOLDER adapter --lora theirs.safetensors --lora-form peft
    """
    folder = resolve_model(model, "MODEL")
    with lasting_imports():
        from neounify.cli.converting import convert_lora_files, convert_model

    if lora_form is not None:
        convert_lora_files(folder, out, weights, lora_form, overwrite.overwrite, report)
        return
    convert_model(folder, out, weights, max_shard_size, overwrite.overwrite, report)
