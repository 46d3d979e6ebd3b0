"""`neounify edit`: images from input images and an instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.batch import BatchOptions
from neounify.cli.generate import generate_batch, generate_prompts
from neounify.cli.models import resolve_model
from neounify.cli.options import (
    FILES,
    EditOptions,
    ImageOutputOptions,
    ModelOptions,
    ReportOptions,
    option,
)


def edit(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The instruction, in quotes.")
    ] = None,
    *,
    image: Annotated[
        list[Path] | None,
        option(
            FILES,
            "FILE",
            "Input image. May be repeated; `<image>` in the prompt marks the position of each.",
        ),
    ] = None,
    model: ModelOptions,
    options: EditOptions,
    output: ImageOutputOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Edit one or more images by an instruction.

    Without a size, the new image has the aspect ratio of the first input image.

    \b
      neounify edit "make the sky green" --image lake.png --model FOLDER
      neounify edit "put <image> into the style of <image>" --image cat.png --image oil.png
      neounify edit --input edits.jsonl --output images
    """
    resolve_model(model.model)
    prompts = None if prompt is None else [prompt]
    if batch.input is not None:
        generate_batch(prompts, image or (), model, options, output, batch, report)
    else:
        generate_prompts(prompts, image or (), model, options, output, batch, report)
