"""What `neounify doctor` does."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import typer

from neounify.checkpoint.load import resolve_device
from neounify.cli.display import Display
from neounify.cli.errors import UsageError
from neounify.cli.options import ReportOptions
from neounify.cli.session import default_device
from neounify.runtime import keep_freed_memory
from neounify.train.doctor import NO_TIME, Finding, examine
from neounify.train.recipe import read_recipe
from neounify.train.setup import build_source, starting_model

MARKS = {True: "ok  ", False: "BAD ", None: "note"}


def run_doctor(
    path: Path, stage: str | None, seconds: float, device: str | None, report: ReportOptions
) -> None:
    """Examine a stage of a recipe; exit status 1 when something is wrong."""
    recipe = read_recipe(path)
    stages = {item.name: item for item in recipe.stages}
    if stage is not None and stage not in stages:
        raise UsageError(f"no stage {stage}; the recipe has {', '.join(stages)}")
    chosen = recipe.stages[0] if stage is None else stages[stage]
    if not math.isfinite(seconds):
        raise UsageError(f"--seconds must be a number of seconds, got {seconds}")
    display = Display(quiet=report.quiet, json=report.json)
    where = resolve_device(device or default_device())
    source = build_source(chosen.data, 0)  # data of another form is reported before a model loads
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        start = starting_model(recipe, where, Path(folder))
    found: list[Finding] = []
    for finding in examine(start, chosen, seconds, source=source):
        found.append(finding)
        display.say(f"{MARKS[finding.good]} {finding.name:20} {finding.what}")
        if finding.advice:
            display.say(f"     {finding.advice}")
    wrong = [finding.name for finding in found if finding.good is False]
    undecided = [finding.name for finding in found if finding.advice.startswith(NO_TIME)]
    display.emit({"stage": chosen.name, "findings": [asdict(f) for f in found]})
    if wrong:
        display.say(f"\nnot healthy: {', '.join(wrong)}")
        raise typer.Exit(1)
    if undecided:
        display.say(f"\nnothing wrong so far; {NO_TIME}: {', '.join(undecided)}")
        return
    display.say("\nhealthy")
