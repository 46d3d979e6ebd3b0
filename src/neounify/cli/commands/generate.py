"""`neounify generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from neounify.cli.models import resolve_model
from neounify.cli.options import (
    BatchOptions,
    GenerateOptions,
    ModelOptions,
    PictureOutputOptions,
    ReportOptions,
)
from neounify.runtime import lasting_imports


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT", help="What to paint, in quotes. Several prompts give several images."
        ),
    ] = None,
    *,
    model: ModelOptions,
    options: GenerateOptions,
    output: PictureOutputOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Paint pictures from words.

    The picture is saved as a PNG in the folder `outputs`, with everything needed to paint
    it again inside the file and beside it as JSON.

    \b
      neounify generate "a red boat on a calm lake" --model FOLDER
      neounify generate "a cat" "a dog" --size 1024x768 --seed 7 --count 4
      neounify generate --input prompts.jsonl --output pictures
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.picture_commands import paint_batch, paint_orders

    if batch.input is not None:
        paint_batch(prompts, (), model, options, output, batch, report)
    else:
        paint_orders(prompts, (), model, options, output, batch, report)
