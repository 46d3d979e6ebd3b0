"""What `neounify train` does."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from neounify.checkpoint.load import resolve_device
from neounify.cli.checks import check_threads
from neounify.cli.display import Display
from neounify.cli.errors import CliError
from neounify.cli.options import ReportOptions, ThreadOptions
from neounify.cli.session import default_device
from neounify.lock import locked_folder
from neounify.runtime import keep_freed_memory
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.preview import Painter
from neounify.train.recipe import Recipe, read_recipe
from neounify.train.setup import StageSources, starting_model
from neounify.train.stages import Progress, stages_to_run
from neounify.train.state import newest_whole_state, saved_states


def run_training(
    path: Path,
    out: Path | None,
    resume: str | None,
    stages: list[str],
    place: ThreadOptions,
    report: ReportOptions,
) -> None:
    """Run a recipe. Raises CliError and what the parts raise."""
    check_threads(place.threads)
    recipe = read_recipe(path)
    folder = out or Path("out") / recipe.name
    with locked_folder(folder):
        _train(recipe, folder, resume, stages, place, report)


def _train(
    recipe: Recipe,
    folder: Path,
    resume: str | None,
    stages: list[str],
    place: ThreadOptions,
    report: ReportOptions,
) -> None:
    display = Display(quiet=report.quiet, json=report.json)
    state = _state(folder, resume, display)
    where = resolve_device(place.device or default_device())
    # Wrong names and unreadable data are reported before a model is loaded.
    numbers = stages_to_run(recipe, Progress(), stages if state is None else [])
    sources = StageSources(recipe)
    for number in numbers:
        sources.of(recipe.stages[number])
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    keep_freed_memory()
    log = Log(folder, Console(stderr=True, quiet=report.quiet))
    start = starting_model(recipe, where, folder)
    painter = Painter(recipe, folder, sources)
    trainer = Trainer(recipe, start, folder, log, painter, sources)
    if state is not None:
        trainer.resume(state)
        display.note(f"going on from {state}")
    try:
        trainer.run(only=stages)
    except KeyboardInterrupt:
        display.note(f"stopped; the same command with --resume auto goes on from {folder}")
        raise
    display.result(f"saved {folder / 'model'}", folder / "model")


def export_newest(path: Path, out: Path | None, target: Path, report: ReportOptions) -> None:
    """Write the newest saved state of a run as a checkpoint. Raises CliError."""
    recipe = read_recipe(path)
    folder = out or Path("out") / recipe.name
    display = Display(quiet=report.quiet, json=report.json)
    state = newest_whole_state(folder / "states", display.note)
    if state is None:
        raise CliError(f"{folder} holds no saved state yet")
    start = starting_model(recipe, torch.device("cpu"), folder)
    log = Log(folder, Console(stderr=True, quiet=True), tensorboard=False)
    Trainer(recipe, start, folder, log).export_state(state, target, torch.bfloat16)
    display.result(f"saved {target} from {state.name}", target)


def _state(folder: Path, resume: str | None, display: Display) -> Path | None:
    if resume is None:
        if saved_states(folder / "states"):
            raise CliError(
                f"{folder} holds a run already; go on with --resume auto, or choose another --out"
            )
        return None
    if resume == "auto":
        return newest_whole_state(folder / "states", display.note)
    return Path(resume)
