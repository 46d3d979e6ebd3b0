"""`neounify edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.models import resolve_model
from neounify.cli.options import (
    FILES,
    BatchOptions,
    EditOptions,
    ModelOptions,
    PictureOutputOptions,
    ReportOptions,
)
from neounify.runtime import lasting_imports


def edit(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to change, in quotes.")
    ] = None,
    *,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A picture to start from. May be repeated; `<image>` in the prompt marks "
            "where each belongs.",
            rich_help_panel=FILES,
        ),
    ] = None,
    model: ModelOptions,
    options: EditOptions,
    output: PictureOutputOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Paint a new picture from one or more pictures and an instruction.

    Without a size, the new picture has the shape of the first one.

    \b
      neounify edit "make the sky green" --image lake.png --model FOLDER
      neounify edit "put <image> into the style of <image>" --image cat.png --image oil.png
      neounify edit --input edits.jsonl --output pictures
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.picture_commands import paint_batch, paint_orders

    prompts = None if prompt is None else [prompt]
    if batch.input is not None:
        paint_batch(prompts, image or (), model, options, output, batch, report)
    else:
        paint_orders(prompts, image or (), model, options, output, batch, report)
