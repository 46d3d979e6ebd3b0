"""`neounify curate`: measure, filter and deduplicate data for training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.command import CliError
from neounify.cli.display import Display
from neounify.cli.options import FILES, ReportOptions, option
from neounify.runtime import lasting_imports

WORK = "Workers"
MAX_DAMAGE = 10
"""Messages about files that could not be indexed; the report has more."""


def curate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the curation.")],
    *,
    out: Annotated[
        Path | None,
        option(FILES, "DIR", "Folder of the results. Default: out/NAME of the recipe."),
    ] = None,
    workers: Annotated[
        int | None,
        option(WORK, "N", "Processes. Default: one for each core.", min=1),
    ] = None,
    ray: Annotated[
        str | None,
        option(WORK, "local|ADDRESS", "Run the workers as actors of a Ray cluster."),
    ] = None,
    report: ReportOptions,
) -> None:
    """Drop what should not be trained on: damaged, poor, unsafe and repeated images and texts.

    The folder gets shards/ for `kind = "shards"`, table/ with a row for every sample,
    report.html and summary.json. A run that was stopped does the rest when it is started again.

    \b
      neounify curate mine.toml
      neounify curate mine.toml --workers 4 --out curated
    """
    with lasting_imports():
        from neounify.curate import curate as run
        from neounify.curate import read_curate_recipe

    display = Display(quiet=report.quiet, json=report.json)
    parsed = read_curate_recipe(recipe)
    folder = out or Path("out") / parsed.name
    if folder.is_file():
        raise CliError(f"{folder} is a file; the results are a folder")
    summary = run(parsed, folder, workers=workers or os.cpu_count() or 1, ray=ray, bar=display.bar)
    for name, count in summary.samples.items():
        kept = summary.kept[name]
        display.say(f"{name}: {kept:,} of {count:,} samples kept ({kept / max(1, count):.1%})")
        for reason, dropped in summary.dropped[name].items():
            display.say(f"  {reason:28} {dropped:>12,}")
    for text in summary.damage[:MAX_DAMAGE]:
        display.note(f"not indexed: {text}")
    display.emit({"folder": str(folder), **vars(summary)})
    display.result(f"saved {folder} (report.html shows examples)", folder)
