"""`neounify toy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.options import OverwriteOptions, ReportOptions
from neounify.runtime import lasting_imports


def toy(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    *,
    seed: Annotated[int, typer.Option(metavar="N", help="Number of the random draw.")] = 0,
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Make a tiny untrained model, to try the other commands with.

    Its weights are random: it answers and paints noise, but quickly and on any machine.

    \b
      neounify toy my-toy
      neounify generate "a red boat" --model my-toy
    """
    with lasting_imports():
        from neounify.cli.converting import make_toy

    make_toy(folder, seed, overwrite.overwrite, report)
