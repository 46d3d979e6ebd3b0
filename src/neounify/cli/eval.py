"""`neounify eval`: SceneBench scores of a model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.cli.command import UsageError, WriteError, explain_os_error
from neounify.cli.display import Display, is_narrow
from neounify.cli.files import check_new_folder, check_writable
from neounify.cli.models import LoadedModel, open_model, resolve_model
from neounify.cli.options import (
    FILES,
    IMAGES,
    ModelOptions,
    OverwriteOptions,
    ReportOptions,
    image_knob,
    option,
)
from neounify.files import locked_folder
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from neounify.scenes.bench import BenchConfig, Outcome, PipelineSubject, Report

CASES, QUICK_CASES = 200, 32
_FILE_WIDTH = 120
_HEAD = "correct, % (95 % interval)"


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Tasks, sampling and report of an evaluation."""

    world: Annotated[
        str,
        typer.Option(metavar="easy|default|wide|hard", help="Synthetic world of the scenes."),
    ] = "default"
    tasks: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Comma-separated list of paint, vqa, caption, edit, story, reconstruction "
            "(the default), wording, sizes.",
            show_default=False,
        ),
    ] = "paint,vqa,caption,edit,story,reconstruction"
    cases: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Cases per category. Default: {CASES}.", min=1),
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Only {QUICK_CASES} cases per category.")
    ] = False
    steps: Annotated[int | None, image_knob("steps", "N")] = None
    guidance: Annotated[float | None, image_knob("guidance", "G")] = None
    think: Annotated[
        bool,
        option(
            IMAGES, None, "Let the model write a thought before it generates and edits.", "--think"
        ),
    ] = False
    seed: Annotated[
        int, typer.Option(metavar="N", help="Random seed of cases and noise.", min=0)
    ] = 0
    batch_size: Annotated[
        int,
        typer.Option(metavar="N", help="Cases per batch; affects only speed and memory.", min=1),
    ] = 64
    output: Annotated[
        Path,
        option(FILES, "DIR", "Folder of the report and its images.", "--output", "--out", "-o"),
    ] = Path("out/eval")

    @property
    def number(self) -> int:
        """Cases per category."""
        return self.cases or (QUICK_CASES if self.quick else CASES)


def evaluate(
    *,
    model: ModelOptions,
    options: EvalOptions,
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Evaluate a model with SceneBench; every answer and image is checked by a program.

    Image generation in nine categories, questions, captions, edits, stories and reconstruction,
    with 95 % intervals and separate scores for combinations held out of training. Ctrl-C keeps the
    finished categories.

    \b
      neounify eval --model FOLDER
      neounify eval --model FOLDER --quick --tasks paint,vqa
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.checks import check_model
        from neounify.flow.sampling import ImageSampling
        from neounify.scenes.bench import PipelineSubject

    model_config = check_model(model).config
    config = _config(options, model_config.token_size)
    ImageSampling(steps=options.steps, guidance=options.guidance).resolve(
        model_config, editing=True
    )
    check_new_folder(options.output, "a report", overwrite=overwrite.overwrite)
    check_writable(options.output)
    display = Display(quiet=report.quiet, json=report.json)
    with locked_folder(options.output):
        loaded = open_model(model, display)
        subject = PipelineSubject(loaded.pipe, steps=options.steps, guidance=options.guidance)
        about = _about(options, config, loaded, subject)
        _measure(subject, config, about, options.output, display)


def _config(options: EvalOptions, token_size: int) -> BenchConfig:
    from neounify.data.sample import DataError
    from neounify.scenes.bench import BenchConfig
    from neounify.scenes.world import scene_config

    try:
        return BenchConfig(
            world=scene_config(options.world),
            tasks=tuple(task.strip() for task in options.tasks.split(",") if task.strip()),
            cases=options.number,
            seed=options.seed,
            batch_size=options.batch_size,
            think=options.think,
            token_size=token_size,
        )
    except DataError as error:
        raise UsageError(str(error)) from error


def _measure(
    subject: PipelineSubject,
    config: BenchConfig,
    about: dict[str, Any],
    folder: Path,
    display: Display,
) -> None:
    """Measure category by category; finished ones are reported even if the rest fails."""
    from neounify.scenes.bench import names
    from neounify.scenes.bench.runners import plan

    outcomes: list[Outcome] = []
    total, started = len(names(config)), time.monotonic()
    try:
        for number, category in enumerate(plan(subject, config), start=1):
            label = f"{category.name} ({number} of {total})"
            with display.bar(label, total=len(category.held_out), unit="case") as tick:
                outcomes.append(category.run(tick))
            display.note(f"{category.name:21} {outcomes[-1].score.strict}")
    except KeyboardInterrupt:
        kept = f"; {len(outcomes)} of {total} categories are measured"
        raise KeyboardInterrupt(f"{kept}, see {folder}" if outcomes else kept) from None
    finally:
        if outcomes:
            about["categories_left"] = total - len(outcomes)
            _report(outcomes, about, started, folder, display)
    display.result(f"saved {folder}", folder)


def _report(
    outcomes: list[Outcome],
    about: dict[str, Any],
    started: float,
    folder: Path,
    display: Display,
) -> None:
    from neounify.bench.result import RESULT
    from neounify.bench.scenes import scene_result
    from neounify.scenes.bench import write_folder
    from neounify.scenes.bench.run import surroundings, to_report

    result = to_report(outcomes, about | surroundings(started))
    try:
        write_folder(result, outcomes, folder)
        scene_result(outcomes, result.about).write(folder / RESULT)
    except OSError as error:
        raise WriteError(
            f"the report in {folder} could not be written: {explain_os_error(error)}\n"
            "The scores are shown above. Free some space or choose another --output, and run the "
            "command again for the files."
        ) from error
    finally:
        if not display.quiet and not display.json:
            _show(result)
        display.emit(result.to_json())


def _about(
    options: EvalOptions, config: BenchConfig, model: LoadedModel, subject: PipelineSubject
) -> dict[str, Any]:
    return {
        "world": options.world,
        "tasks": list(config.tasks),
        "cases": config.cases,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "think": config.think,
        "sampling": subject.sampling,
        "model": model.description,
    }


def _show(report: Report) -> None:
    """Print rates and measures; attributes are in the files only."""
    from rich.console import Console

    # A file or a pipe has no width to fold cells to.
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)
    narrow = is_narrow(console)
    if narrow:
        typer.echo(f"category (n)\n  {_HEAD}\n  seen in training, held out of it")
        for score in report.scores:
            rates = f"seen {score.seen or '-'}, held out {score.held_out or '-'}"
            typer.echo(f"{score.category} ({score.strict.number})\n  {score.strict}\n  {rates}")
    else:
        console.print(_table(report))
    _show_forms(report, console, narrow=narrow)
    for category, measures in report.measures.items():
        values = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
        console.print(f"  {category}: {values}", markup=False)


def _show_forms(report: Report, console: Console, *, narrow: bool) -> None:
    """The rates of categories that have several forms, split by form."""
    from rich.box import SIMPLE
    from rich.table import Table

    rows = [
        (f"{score.category}: {form}", str(rate.number), str(rate))
        for score in report.scores
        for form, rate in score.forms.items()
    ]
    if narrow:
        for form, number, rate in rows:
            typer.echo(f"{form} ({number})\n  {rate}")
    elif rows:
        table = Table(title="by form", box=SIMPLE, padding=(0, 1))
        table.add_column("form", no_wrap=True)
        for head in ("n", "all"):
            table.add_column(head, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _table(report: Report) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=_HEAD, box=SIMPLE, padding=(0, 1))
    table.add_column("category", no_wrap=True)
    for head in ("n", "all", "seen", "held out"):
        table.add_column(head, justify="right")
    for score in report.scores:
        rates = [str(rate or "") for rate in (score.strict, score.seen, score.held_out)]
        table.add_row(score.category, str(score.strict.number), *rates)
    return table
