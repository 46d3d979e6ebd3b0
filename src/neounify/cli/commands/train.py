"""`neounify train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.options import FILES, ReportOptions, ThreadOptions
from neounify.runtime import lasting_imports


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the run.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the run; out/NAME of the recipe by default.",
            rich_help_panel=FILES,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|DIR",
            help="Go on from the newest saved state of the run's folder, or from one you name.",
        ),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME", help="Train only this stage; may be repeated."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Train nothing: write the newest state as a bfloat16 checkpoint into DIR.",
            rich_help_panel=FILES,
        ),
    ] = None,
    place: ThreadOptions,
    report: ReportOptions,
) -> None:
    """Train or fine-tune a model as a recipe says: one command runs all its stages, or one.

    The folder fills with log.jsonl, TensorBoard files, pictures of progress, resumable states,
    and model/, a checkpoint in the published layout.

    \b
      neounify train recipes/scenes.toml
      neounify train recipes/scenes.toml --resume auto
      neounify train recipes/scenes.toml --export my-model
    """
    with lasting_imports():
        from neounify.cli.training import export_newest, run_training

    if export is not None:
        export_newest(recipe, out, export, report)
        return
    run_training(recipe, out, resume, stages or [], place, report)
