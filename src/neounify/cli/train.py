"""`neounify train`: run the stages of a recipe, or export a saved state."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neounify.cli.command import CliError
from neounify.cli.display import Display
from neounify.cli.models import default_device
from neounify.cli.options import FILES, ReportOptions, ThreadOptions, option
from neounify.files import locked_folder
from neounify.runtime import keep_freed_memory, lasting_imports

if TYPE_CHECKING:
    from neounify.train.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the run.")],
    *,
    out: Annotated[
        Path | None,
        option(FILES, "DIR", "Folder of the run. Default: out/NAME of the recipe."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|DIR",
            help="Resume from the newest saved state of the run's folder, or from the one named.",
        ),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME", help="Train only this stage. May be repeated."),
    ] = None,
    export: Annotated[
        Path | None,
        option(
            FILES, "DIR", "Do not train: write the newest state as a bfloat16 checkpoint into DIR."
        ),
    ] = None,
    where: ThreadOptions,
    report: ReportOptions,
) -> None:
    """Train or fine-tune a model with a recipe: all of its stages, or some.

    The folder of the run holds log.jsonl, TensorBoard files, sample images, resumable states,
    and model/, a checkpoint in the published layout.

    \b
      neounify train recipes/scenes.toml
      neounify train recipes/scenes.toml --resume auto
      neounify train recipes/scenes.toml --export my-model
    """
    with lasting_imports():
        from neounify.cli.checks import check_threads
        from neounify.train.recipe import read_recipe

    check_threads(where.threads)
    display = Display(quiet=report.quiet, json=report.json)
    with display.deprecations():
        parsed = read_recipe(recipe)
    folder = out or Path("out") / parsed.name
    if export is not None:
        _export_newest(parsed, folder, export, display)
        return
    with locked_folder(folder):
        _train(parsed, folder, resume, stages or [], where, display)


def _train(
    recipe: Recipe,
    folder: Path,
    resume: str | None,
    stages: list[str],
    where: ThreadOptions,
    display: Display,
) -> None:
    with lasting_imports():
        import torch
        from rich.console import Console

        from neounify.checkpoint.load import resolve_device
        from neounify.train.log import Log
        from neounify.train.loop import Trainer
        from neounify.train.progress import Progress, SampleGrid, stages_to_run
        from neounify.train.setup import StageSources, build_setup

    state = _state(folder, resume, display)
    device = resolve_device(where.device or default_device())
    # Unknown stages and unreadable data are reported before a model is loaded.
    numbers = stages_to_run(recipe, Progress(), stages if state is None else [])
    sources = StageSources(recipe)
    for number in numbers:
        sources.list(recipe.stages[number])
    if where.threads is not None:
        torch.set_num_threads(where.threads)
    keep_freed_memory()
    log = Log(folder, Console(stderr=True, quiet=display.quiet))
    setup = build_setup(recipe, device, folder)
    trainer = Trainer(recipe, setup, folder, log, SampleGrid(recipe, folder, sources), sources)
    if state is not None:
        trainer.resume(state)
        display.note(f"resuming from {state}")
    # Schedulers end jobs with SIGTERM: as Ctrl-C, it leaves whole states and a word on resuming.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        trainer.run(only=stages)
    except KeyboardInterrupt:
        display.note(f"stopped; run the same command with --resume auto to resume from {folder}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    display.result(f"saved {folder / 'model'}", folder / "model")


def _export_newest(recipe: Recipe, folder: Path, target: Path, display: Display) -> None:
    """Write the newest saved state of a run as a checkpoint. Raises CliError."""
    import torch
    from rich.console import Console

    from neounify.train.log import Log
    from neounify.train.loop import Trainer
    from neounify.train.setup import build_setup
    from neounify.train.state import newest_whole_state

    state = newest_whole_state(folder / "states", display.note)
    if state is None:
        raise CliError(f"{folder} holds no saved state yet")
    setup = build_setup(recipe, torch.device("cpu"), folder)
    log = Log(folder, Console(stderr=True, quiet=True), tensorboard=False)
    Trainer(recipe, setup, folder, log).export_state(state, target, torch.bfloat16)
    display.result(f"saved {target} from {state.name}", target)


def _state(folder: Path, resume: str | None, display: Display) -> Path | None:
    """The state to resume from. CliError for a new run in the folder of another."""
    from neounify.train.state import newest_whole_state, saved_states

    if resume is None:
        if saved_states(folder / "states"):
            raise CliError(
                f"{folder} already holds a run; continue it with --resume auto, or choose another "
                "--out"
            )
        return None
    if resume == "auto":
        return newest_whole_state(folder / "states", display.note)
    return Path(resume)
