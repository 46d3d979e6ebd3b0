"""`neounify doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.options import DeviceOptions, ReportOptions
from neounify.runtime import lasting_imports


def doctor(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the run.")],
    *,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which stage; the first by default.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Time for overfitting samples.", min=1)
    ] = 90,
    place: DeviceOptions,
    report: ReportOptions,
) -> None:
    """Check a fine-tune before it costs days: data, gradients, freezing, losses, images.

    Overfits one sample of every task and says in plain words what is wrong. Ends with status 1 if
    something is. What would need more time than --seconds gets no verdict.

    \b
      neounify doctor recipes/scenes.toml
    """
    with lasting_imports():
        from neounify.cli.doctoring import run_doctor

    run_doctor(recipe, stage, seconds, place.device, report)
