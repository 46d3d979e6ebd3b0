"""`neounify eval`: SceneBench or MotionBench scores of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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

    from neounify.config import ModelConfig
    from neounify.pipeline import Pipeline
    from neounify.scenes.bench import Category, Outcome, Report

CASES, QUICK_CASES = 200, 32
_FILE_WIDTH = 120
_HEAD = "correct, % (95 % interval)"


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Tasks, sampling and report of an evaluation."""

    benchmark: Annotated[
        str,
        typer.Option(metavar="scenes|motion", help="SceneBench, or MotionBench for clips."),
    ] = "scenes"
    world: Annotated[
        str,
        typer.Option(
            metavar="easy|default|wide|hard", help="Synthetic world; clips have no wide one."
        ),
    ] = "default"
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Comma-separated list of paint, vqa, caption, edit, story, reconstruction "
            "(the default), wording, sizes; of clips: direction, kind, pair, question, continue.",
        ),
    ] = None
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
    with 95 % intervals and separate scores for combinations held out of training. MotionBench
    measures clips: their directions and kinds of motion, questions, and continuation. Ctrl-C keeps
    the finished categories.

    \b
      neounify eval --model FOLDER
      neounify eval --model FOLDER --quick --tasks paint,vqa
      neounify eval --model FOLDER --benchmark motion
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.checks import check_model

    run = _run(options, check_model(model).config)
    check_new_folder(options.output, "a report", overwrite=overwrite.overwrite)
    check_writable(options.output)
    display = Display(quiet=report.quiet, json=report.json)
    with locked_folder(options.output):
        loaded = open_model(model, display)
        sampling, categories = run.begin(loaded.pipe)
        about = _about(options, run, loaded, sampling)
        _measure(run, categories, about, options.output, display)


@dataclass(frozen=True)
class _Run:
    """One benchmark as asked for: its name in results, its tasks, and its categories by name.

    `begin` gives the sampling settings of a pipeline and the categories to measure on it; sheets of
    `known` categories are removed before new ones are written, None for those of SceneBench.
    """

    benchmark: str
    tasks: Sequence[str]
    names: Sequence[str]
    begin: Callable[[Pipeline], tuple[dict[str, Any], Iterator[Category]]]
    known: Sequence[str] | None = None


def _run(options: EvalOptions, model: ModelConfig) -> _Run:
    """The benchmark that is asked for. Raises UsageError, and RequestError for the sampling."""
    from neounify.data.sample import DataError

    runs = {"scenes": _scenes, "motion": _motion}
    if options.benchmark not in runs:
        raise UsageError(f"no benchmark {options.benchmark!r}; there are {', '.join(runs)}")
    try:
        return runs[options.benchmark](options, model)
    except DataError as error:
        raise UsageError(str(error)) from error


def _asked(options: EvalOptions, default: Sequence[str]) -> tuple[str, ...]:
    """The tasks of a run."""
    if options.tasks is None:
        return tuple(default)
    return tuple(task.strip() for task in options.tasks.split(",") if task.strip())


def _scenes(options: EvalOptions, model: ModelConfig) -> _Run:
    from neounify.flow.sampling import ImageSampling
    from neounify.scenes.bench import TASKS, BenchConfig, PipelineSubject, names
    from neounify.scenes.bench.runners import plan
    from neounify.scenes.world import scene_config

    config = BenchConfig(
        world=scene_config(options.world),
        tasks=_asked(options, TASKS),
        cases=options.number,
        seed=options.seed,
        batch_size=options.batch_size,
        think=options.think,
        token_size=model.token_size,
    )
    ImageSampling(steps=options.steps, guidance=options.guidance).resolve(model, editing=True)

    def begin(pipe: Pipeline) -> tuple[dict[str, Any], Iterator[Category]]:
        subject = PipelineSubject(pipe, steps=options.steps, guidance=options.guidance)
        return subject.sampling, plan(subject, config)

    return _Run("scenebench", config.tasks, names(config), begin)


def _motion(options: EvalOptions, model: ModelConfig) -> _Run:
    from neounify.flow.sampling import ImageSampling
    from neounify.motion.bench import (
        MotionBenchConfig,
        PipelineMotionSubject,
        bench_tasks,
        known_motion_names,
        motion_names,
        motion_plan,
    )
    from neounify.motion.world import motion_config
    from neounify.motion.world.scene import FPS
    from neounify.tasks.video import clip_shape

    if options.think:
        raise UsageError("clips are generated without a thought: leave out --think")
    world = motion_config(options.world)
    config = MotionBenchConfig(
        world=world,
        tasks=_asked(options, bench_tasks(world)),
        cases=options.number,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    if set(config.tasks) - {"question"}:
        for frames in world.lengths:
            clip_shape(model, (world.side, world.side), frames, FPS)
    if "question" in config.tasks:
        model.check_can("chat_video")
    if "continue" in config.tasks:
        model.check_can("continue_video")
    ImageSampling(steps=options.steps, guidance=options.guidance).resolve(
        model, editing=False, video=True
    )

    def begin(pipe: Pipeline) -> tuple[dict[str, Any], Iterator[Category]]:
        subject = PipelineMotionSubject(pipe, steps=options.steps, guidance=options.guidance)
        return subject.sampling, motion_plan(subject, config)

    return _Run("motionbench", config.tasks, motion_names(config), begin, known_motion_names())


def _measure(
    run: _Run,
    categories: Iterator[Category],
    about: dict[str, Any],
    folder: Path,
    display: Display,
) -> None:
    """Measure category by category; finished ones are reported even if the rest fails."""
    outcomes: list[Outcome] = []
    total, started = len(run.names), time.monotonic()
    try:
        for number, category in enumerate(categories, start=1):
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
            _report(run, outcomes, about, started, folder, display)
    display.result(f"saved {folder}", folder)


def _report(
    run: _Run,
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
        write_folder(result, outcomes, folder, run.known)
        scene_result(outcomes, result.about, run.benchmark).write(folder / RESULT)
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
    options: EvalOptions, run: _Run, model: LoadedModel, sampling: dict[str, Any]
) -> dict[str, Any]:
    return {
        "world": options.world,
        "tasks": list(run.tasks),
        "cases": options.number,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "think": options.think,
        "sampling": sampling,
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
