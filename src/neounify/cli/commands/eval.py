"""`neounify eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.options import FILES, PAINTING, ModelOptions, OverwriteOptions, ReportOptions


def evaluate(
    *,
    model: ModelOptions,
    world: Annotated[
        str, typer.Option(metavar="NAME", help="World of scenes: easy, default, wide or hard.")
    ] = "default",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Of paint, vqa, caption, edit, story, reconstruction; by commas.",
        ),
    ] = "paint,vqa,caption,edit,story,reconstruction",
    cases: Annotated[int, typer.Option(metavar="N", help="Cases per category.", min=1)] = 200,
    quick: Annotated[bool, typer.Option("--quick", help="Only 32 cases per category.")] = False,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Denoising steps.", rich_help_panel=PAINTING, min=1),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="X", help="Guidance by the text.", rich_help_panel=PAINTING),
    ] = None,
    think: Annotated[
        bool,
        typer.Option(
            "--think", help="Let the model think before it paints.", rich_help_panel=PAINTING
        ),
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the cases and the noise.", min=0)] = 0,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Cases at once; changes nothing but speed.", min=1)
    ] = 64,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for report and pictures.", rich_help_panel=FILES),
    ] = Path("out/eval"),
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Measure a model with SceneBench: every claim is checked by a program.

    Painting in nine categories, questions, captions, edits, stories and reconstruction, with
    95 % intervals and the share on combinations that training never showed.

    \b
      neounify eval --model FOLDER
      neounify eval --model FOLDER --quick --tasks paint,vqa
    """
    from neounify.cli.evaluating import EvalSettings, run_evaluation

    settings = EvalSettings(
        world=world,
        tasks=tuple(task.strip() for task in tasks.split(",") if task.strip()),
        cases=32 if quick else cases,
        steps=steps,
        guidance=guidance,
        think=think,
        seed=seed,
        batch_size=batch_size,
    )
    run_evaluation(model, settings, out, overwrite.overwrite, report)
