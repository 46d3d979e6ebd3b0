"""`neounify train`: run the stages of a recipe, or export a saved state."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neounify.cli.command import CliError
from neounify.cli.display import Display
from neounify.cli.files import check_apart, check_new_folder
from neounify.cli.options import FILES, OverwriteOptions, ReportOptions, ThreadOptions, option
from neounify.cli.ranks import all_ranks, device_of
from neounify.files import locked_folder
from neounify.runtime import keep_freed_memory, lasting_imports

if TYPE_CHECKING:
    from neounify.distributed.ranks import Ranks
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
    overwrite: OverwriteOptions,
    where: ThreadOptions,
    report: ReportOptions,
) -> None:
    """Train or fine-tune a model with a recipe: all of its stages, or some.

    The folder of the run holds log.jsonl, TensorBoard files, sample images, resumable states,
    and model/, a checkpoint in the published layout.

    \b
      neounify train recipes/scenes.toml
      neounify train recipes/scenes.toml --resume auto
      torchrun --nproc-per-node 2 -m neounify train recipes/miniature.toml
      neounify train recipes/scenes.toml --export my-model
    """
    with lasting_imports():
        from neounify.cli.checks import check_threads
        from neounify.train.parallel import check_shared
        from neounify.train.recipe import read_recipe

    if overwrite.overwrite and export is None:
        raise CliError("--overwrite is for --export")
    check_threads(where.threads)
    with all_ranks() as ranks:
        # The first rank speaks for all.
        silent = not ranks.first
        display = Display(quiet=report.quiet or silent, json=report.json or silent)
        with display.deprecations():
            parsed = ranks.together(lambda: read_recipe(recipe))
        folder = out or Path("out") / parsed.name
        if export is not None:
            target, replace = export, overwrite.overwrite
            ranks.together(
                lambda: (
                    _export_newest(parsed, folder, target, display, overwrite=replace)
                    if ranks.first
                    else None
                )
            )
            return
        with ExitStack() as stack:
            ranks.together(
                lambda: stack.enter_context(locked_folder(folder)) if ranks.first else None
            )
            ranks.together(lambda: check_shared(folder, ranks))
            _train(parsed, folder, resume, stages or [], where, display, ranks)


def _train(
    recipe: Recipe,
    folder: Path,
    resume: str | None,
    stages: list[str],
    where: ThreadOptions,
    display: Display,
    ranks: Ranks,
) -> None:
    with lasting_imports():
        import torch
        from rich.console import Console

        from neounify.train.log import Log
        from neounify.train.loop import Trainer
        from neounify.train.parallel import check_model, check_parallel, fingerprint
        from neounify.train.previews import SampleGrid
        from neounify.train.progress import Progress, stages_to_run
        from neounify.train.setup import StageSources, build_setup, recipe_config

    ranks.check_alike("the recipe", repr(recipe))
    ranks.together(lambda: check_model(recipe_config(recipe), check_parallel(recipe, ranks.size)))
    newest = ranks.together(
        lambda: _state(folder, resume, display, ranks.launch) if ranks.first else None
    )
    state = ranks.gather(newest)[0]
    # Unknown stages and unreadable data are reported before a model is loaded.
    numbers = ranks.together(
        lambda: stages_to_run(recipe, Progress(), stages if state is None else [])
    )
    sources = StageSources(recipe)
    built = ranks.together(lambda: [sources.list(recipe.stages[number]) for number in numbers])
    ranks.check_alike("the data", ranks.together(lambda: fingerprint(chain(*built))))
    if where.threads is not None:
        torch.set_num_threads(where.threads)
    keep_freed_memory()
    console = Console(stderr=True, quiet=display.quiet)
    log = ranks.together(lambda: Log(folder, console, writes=ranks.first))
    device = ranks.together(lambda: device_of(where.device, ranks))
    grid = SampleGrid(recipe, folder, sources, ranks)
    # Stages may replace the model, which is then held here no longer.
    trainer = Trainer(
        recipe, build_setup(recipe, device, folder, ranks), folder, log, grid, sources
    )
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


def _export_newest(
    recipe: Recipe, folder: Path, target: Path, display: Display, *, overwrite: bool
) -> None:
    """Write the newest saved state of a run as a checkpoint. Raises CliError."""
    import torch

    from neounify.train.export import export_state
    from neounify.train.state import newest_whole_state

    state = newest_whole_state(folder / "states", display.note)
    if state is None:
        raise CliError(f"{folder} holds no saved state yet")
    check_apart(target, state, recipe.model.checkpoint)
    check_new_folder(target, "a model", overwrite=overwrite)
    export_state(recipe, folder, state, target, torch.bfloat16)
    display.result(f"saved {target} from {state.name}", target)


def _state(folder: Path, resume: str | None, display: Display, launch: str) -> Path | None:
    """The state to resume from: the newest that earlier starts of this launch saved, else as asked.

    Raises CliError for a new run in the folder of another, and CheckpointError.
    """
    from neounify.train.state import (
        check_state,
        newest_of_launch,
        newest_whole_state,
        saved_states,
    )

    states = folder / "states"
    if state := newest_of_launch(states, launch, display.note):
        return state
    if resume is None:
        if saved_states(states):
            raise CliError(
                f"{folder} already holds a run; continue it with --resume auto, or choose another "
                "--out"
            )
        return None
    if resume == "auto":
        return newest_whole_state(states, display.note)
    check_state(Path(resume))
    return Path(resume)
