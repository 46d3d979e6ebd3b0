"""`neounify inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neounify.cli.models import resolve_model
from neounify.cli.options import ReportOptions
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    from neounify.cli.display import Display


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
    with lasting_imports():
        from neounify.cli.inspecting import inspect_model, inspect_picture

    if model is not None and not model.is_dir():
        inspect_picture(model, _display(report))
    else:
        inspect_model(resolve_model(model), _display(report))


def _display(report: ReportOptions) -> Display:
    from neounify.cli.display import Display

    return Display(quiet=report.quiet, json=report.json)
