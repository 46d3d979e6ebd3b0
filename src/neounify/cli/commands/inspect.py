"""`neounify inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.models import resolve_model
from neounify.cli.options import ReportOptions


def inspect(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            envvar="NEOUNIFY_MODEL",
            help="Folder of a checkpoint, or a PNG painted by neounify.",
        ),
    ] = None,
    *,
    report: ReportOptions,
) -> None:
    """Show what a model consists of, or how a picture was painted.

    For a model: its shape, its parameters per stream, part and number format, and whether
    they are complete. The weights are not loaded, so this takes no time and no memory.

    \b
      neounify inspect FOLDER
      neounify inspect outputs/a-red-boat_s0_1.png
    """
    picture = model if model and model.suffix.lower() == ".png" and model.is_file() else None
    folder = None if picture else resolve_model(model)
    from neounify.cli.display import Display
    from neounify.cli.inspecting import inspect_model, inspect_picture

    display = Display(quiet=report.quiet, json=report.json)
    if picture is not None:
        inspect_picture(picture, display)
    elif folder is not None:
        inspect_model(folder, display)
