"""`neounify report`: the page of a training run, written anew from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.display import Display
from neounify.cli.options import ReportOptions
from neounify.runtime import lasting_imports


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    *,
    report: ReportOptions,
) -> None:
    """Write report.html into the folder of a training run.

    One file that needs no network: curves of rewards and losses, the newest sheets of groups,
    warnings and settings. Post-training writes it by itself, at every sheet and at the end.

    \b
      neounify report out/scenes-grpo
    """
    with lasting_imports():
        from neounify.post_train.report import write_report

    display = Display(quiet=report.quiet, json=report.json)
    page = write_report(run)
    display.result(f"saved {page}", page)
