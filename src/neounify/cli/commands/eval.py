"""`neounify eval`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.cli.command import explain_os_error
from neounify.cli.errors import CliError, UsageError, WriteError
from neounify.cli.models import resolve_model
from neounify.cli.options import FILES, PAINTING, ModelOptions, OverwriteOptions, ReportOptions
from neounify.lock import is_empty, locked_folder
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from neounify.cli.display import Display
    from neounify.cli.session import Session
    from neounify.scenes.bench import BenchConfig, Outcome, PipelineSubject, Report

CASES, QUICK_CASES = 200, 32
_FILE_WIDTH = 120
_HEAD = "right, % (95 % interval)"


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, how to sample, and where the report goes."""

    world: Annotated[
        str,
        typer.Option(
            metavar="easy|default|wide|hard", help="World of scenes the cases are drawn from."
        ),
    ] = "default"
    tasks: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Some of paint, vqa, caption, edit, story, reconstruction, with commas between "
            "them. Default: all.",
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
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Denoising steps.", rich_help_panel=PAINTING)
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(metavar="G", help="How strongly the prompt pulls.", rich_help_panel=PAINTING),
    ] = None
    think: Annotated[
        bool,
        typer.Option(
            "--think",
            help="Let the model think before it paints and edits.",
            rich_help_panel=PAINTING,
        ),
    ] = False
    seed: Annotated[int, typer.Option(metavar="N", help="Of the cases and the noise.", min=0)] = 0
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Cases at once; changes nothing but speed.", min=1)
    ] = 64
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "--out",
            "-o",
            metavar="DIR",
            help="Folder for report and pictures.",
            rich_help_panel=FILES,
        ),
    ] = Path("out/eval")

    @property
    def number(self) -> int:
        """Cases per category: as asked for, else by --quick."""
        return self.cases or (QUICK_CASES if self.quick else CASES)


def evaluate(
    *,
    model: ModelOptions,
    options: EvalOptions,
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Measure a model with SceneBench: every claim is checked by a program.

    Painting in nine categories, questions, captions, edits, stories and reconstruction, with
    95 % intervals and the share on combinations that training never showed. Ctrl-C keeps what is
    finished.

    \b
      neounify eval --model FOLDER
      neounify eval --model FOLDER --quick --tasks paint,vqa
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.checks import check_model, check_writable
        from neounify.cli.display import Display
        from neounify.cli.session import open_session
        from neounify.pipeline.request import make_sampling
        from neounify.scenes.bench import PipelineSubject

    if options.output.exists() and not options.output.is_dir():
        raise CliError(f"{options.output} is a file; a report is saved as a folder")
    model_config = check_model(model)
    config = _config(options, model_config.token_size)
    make_sampling(model_config, editing=True, steps=options.steps, guidance=options.guidance)
    check_writable(options.output)
    display = Display(quiet=report.quiet, json=report.json)
    with locked_folder(options.output):
        _check_free(options.output, overwrite.overwrite)
        session = open_session(model, display)
        subject = PipelineSubject(session.pipe, steps=options.steps, guidance=options.guidance)
        about = _about(options, config, session, subject)
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


def _check_free(folder: Path, overwrite: bool) -> None:
    if not is_empty(folder) and not overwrite:
        raise CliError(f"{folder} is not empty; choose another --output, or add --overwrite")


def _measure(
    subject: PipelineSubject,
    config: BenchConfig,
    about: dict[str, Any],
    folder: Path,
    display: Display,
) -> None:
    """Measure category by category; what is finished is reported even if the rest fails."""
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
    from neounify.scenes.bench import write_folder
    from neounify.scenes.bench.run import surroundings, to_report

    found = to_report(outcomes, about | surroundings(started))
    try:
        write_folder(found, outcomes, folder)
    except OSError as error:
        raise WriteError(
            f"the report in {folder} could not be written: {explain_os_error(error)}\n"
            "The scores are shown above. Free some space or choose another --output, and run the "
            "command again for the files."
        ) from error
    finally:
        if not display.quiet and not display.json:
            _show(found)
        display.emit(found.to_json())


def _about(
    options: EvalOptions, config: BenchConfig, session: Session, subject: PipelineSubject
) -> dict[str, Any]:
    return {
        "world": options.world,
        "tasks": list(config.tasks),
        "cases": config.cases,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "think": config.think,
        "sampling": subject.sampling,
        "model": session.description,
    }


def _show(report: Report) -> None:
    """The rates and the measures on stdout; attributes are in the files."""
    from rich.console import Console

    from neounify.cli.display import is_narrow

    # A file or a pipe has no width that cells would have to be folded to.
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)
    narrow = is_narrow(console)
    if narrow:
        typer.echo(f"category (n)\n  {_HEAD}\n  seen in training, held out from it")
        for score in report.scores:
            rates = f"seen {score.seen or '-'}, held out {score.held_out or '-'}"
            typer.echo(f"{score.category} ({score.strict.number})\n  {score.strict}\n  {rates}")
    else:
        console.print(_table(report))
    _show_forms(report, console, narrow=narrow)
    for category, found in report.measures.items():
        told = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        console.print(f"  {category}: {told}", markup=False)


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
