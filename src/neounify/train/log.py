"""Run logging: console lines and progress bar, JSON lines, TensorBoard; divergence warnings."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from neounify.data.sources import FileSource
from neounify.files import write_bytes
from neounify.terminal import duration, progress_bar
from neounify.train.expert_counts import Counts
from neounify.train.recipe import StageRecipe
from neounify.train.speed import Meter

if TYPE_CHECKING:
    from neounify.train.progress import Progress

MAX_HEADLINE = 4
"""Metrics that a line of the console shows, where the method names none."""
MAX_SHOWN = 10
"""Damaged samples that the terminal shows; all are in skipped.txt."""


class Log:
    """Writes log.jsonl, warnings.jsonl, experts.jsonl, skipped.txt and nonfinite.jsonl into a run's
    folder.

    A resume at some step drops later lines of the first three, so that each step is there once.
    Of many ranks, only the first one `writes`.
    """

    def __init__(
        self,
        folder: Path,
        console: Console | None = None,
        *,
        tensorboard: bool = True,
        writes: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._writes = folder, writes
        self.console = console or Console()
        self.file = folder / "log.jsonl"
        self.warnings_file = folder / "warnings.jsonl"
        self.experts_file = folder / "experts.jsonl"
        self.nonfinite_file = folder / "nonfinite.jsonl"
        self._board = _board(folder) if tensorboard and writes else None
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self.skipped_file = folder / "skipped.txt"
        self._listed = _lines(self.skipped_file)
        self._shown = 0

    def rewind(self, step: int) -> None:
        """Drop lines of steps after `step`."""
        for file in (self.file, self.warnings_file, self.experts_file):
            if self._writes and file.is_file():
                _rewind(file, step)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show a progress bar below the lines during a run, on a terminal that is not quiet."""
        if self.console.quiet or not self.console.is_terminal:
            yield
            return
        columns = (MofNCompleteColumn(), TextColumn("{task.fields[pace]}", markup=False))
        with progress_bar(self.console, *columns) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    def stage(self, stage: StageRecipe, progress: Progress, meter: Meter) -> None:
        """Print the start of a stage, or its continuation."""
        self._meter = meter
        frozen = f", frozen: {', '.join(stage.freeze)}" if stage.freeze else ""
        self.console.print(
            f"[bold]stage {stage.name}[/]: {stage.steps:,} steps{frozen}"
            + (f", from step {progress.stage_step:,}" if progress.stage_step else "")
            + f"; a matmul reaches {meter.rate / 1e9:,.0f} Gflop/s in {stage.precision} here",
            highlight=False,
            soft_wrap=True,
        )
        if stage.schedule.warmup >= stage.steps:
            self.warn(
                f"schedule.warmup ({stage.schedule.warmup:,}) is not below steps "
                f"({stage.steps:,}): the full learning rate is never reached"
            )
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._task = self._bar.add_task(
                stage.name, total=stage.steps, completed=progress.stage_step, pace=""
            )

    def step(self, progress: Progress, stage: StageRecipe, operations: float) -> None:
        """After every step, with the operations it computed."""
        self._meter.add(operations)
        if self._bar is not None:
            left = duration(self._meter.seconds_left(progress, stage.steps))
            pace = f"{self._meter.tokens_per_second(progress):,.0f} tokens/s, {left} left"
            self._bar.update(self._task, completed=progress.stage_step, pace=pace)

    def report(
        self,
        progress: Progress,
        stage: StageRecipe,
        metrics: Mapping[str, float],
        rate: float,
        norm: float,
        skipped: Mapping[str, Mapping[str, int]] | None = None,
        headline: Mapping[str, str] | None = None,
        work: Mapping[str, float | list[float]] | None = None,
    ) -> None:
        """The means since the last report; `skipped`: damaged samples by source and reason so far.

        `headline`: label → name of the metrics on the console, by default the first ones. `work`:
        memory and waiting of the ranks.
        """
        speed = self._meter.read(progress)
        left = self._meter.seconds_left(progress, stage.steps)
        record = {
            **asdict(progress),
            "stage": stage.name,
            "learning_rate": rate,
            "gradient_norm": norm,
            "seconds_left": left,
            **speed,
            **(work or {}),
            **metrics,
        }
        reasons = sum((Counter(counts) for counts in (skipped or {}).values()), Counter[str]())
        damaged = reasons.total()
        if skipped:
            record["skipped"] = {name: sum(counts.values()) for name, counts in skipped.items()}
            record["skipped_by_reason"] = {name: dict(counts) for name, counts in skipped.items()}
        self._write("train", record)
        self.console.print(
            f"{progress.stage_step:>7,}/{stage.steps:,}  {_shown(metrics, headline)}"
            f"norm {norm:.2f}  lr {rate:.1e}  {progress.samples:,} samples  "
            f"{speed['tokens_per_second']:,.0f} tokens/s  "
            f"{speed['images_per_second']:,.0f} images/s  "
            + (f"{100 * speed['matmul_share']:.0f} % of matmul  " if speed["matmul_share"] else "")
            + f"{speed['peak_memory_gb']:.1f} GiB  "
            + (f"{damaged:,} damaged samples skipped ({_most(reasons)})  " if damaged else "")
            + f"{duration(left)} left",
            highlight=False,
            soft_wrap=True,
        )

    def evaluation(self, progress: Progress, scores: dict[str, float]) -> None:
        self._write("evaluation", {**asdict(progress), **scores})
        line = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        if line:
            self.console.print(f"[bold]evaluation[/] {line}", highlight=False, soft_wrap=True)

    def damaged(self, messages: Iterable[str]) -> None:
        """Append new damaged samples to skipped.txt; print the first ones of the run."""
        new = [message for message in messages if message not in self._listed]
        if not new or not self._writes:
            return
        self._listed.update(new)
        # Names of files may hold bytes that are not UTF-8.
        with self.skipped_file.open("a", encoding="utf-8", errors="replace") as file:
            file.writelines(message + "\n" for message in new)
        for message in new[: MAX_SHOWN - self._shown]:
            self._print(f"skipped {message}", "yellow")
        if self._shown < MAX_SHOWN <= self._shown + len(new):
            self._print(f"further damaged samples are counted, and listed in {self.skipped_file}")
        self._shown = min(MAX_SHOWN, self._shown + len(new))

    def experts(self, progress: Progress, tokens: Counts) -> None:
        """Keep the tokens of each expert since the last report, of a model that has experts."""
        if tokens:
            self._append(self.experts_file, {"step": progress.step, "tokens": dict(tokens)})

    def files(self, progress: Progress, sources: Iterable[FileSource]) -> None:
        """List what of the sources could not be indexed; warn of fields that are not read."""
        for source in sources:
            self.damaged(source.damage)
            if names := sorted(source.rules.unread):
                what = ", ".join(names)
                self.warning(
                    progress,
                    f"data {source.name}: fields that are not read: {what}. If that is right, list "
                    "them in the recipe (ignore = [...])",
                )

    def warning(self, progress: Progress, message: str) -> None:
        """Print what a method warns of, and keep it in warnings.jsonl."""
        self._append(self.warnings_file, {"step": progress.step, "message": message})
        self.warn(message)

    def warn(self, message: str) -> None:
        """Print something that the user should act on."""
        self._print(message, "bold yellow")

    def sources(self, lines: Iterable[str]) -> None:
        """Print the usable share of each data source at the end of a stage."""
        for line in lines:
            self._print(f"data {line}")

    def _print(self, text: str, style: str | None = None) -> None:
        # Messages may hold brackets that are not markup.
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def nonfinite(self, progress: Progress, samples: Sequence[str]) -> None:
        self._append(self.nonfinite_file, {"step": progress.step, "samples": list(samples)})
        self.console.print(
            f"[yellow]step {progress.step:,}: loss or gradient not finite, step skipped[/]"
        )

    def _append(self, file: Path, record: Mapping[str, Any]) -> None:
        if self._writes:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record, allow_nan=False) + "\n")

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        # JSON has no NaN and no infinities.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._append(self.file, {"kind": kind, **finite})
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float) and math.isfinite(value):
                    self._board.add_scalar(f"{kind}/{name}", value, record["step"])


def _rewind(file: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and those cut short."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_bytes(file, "".join(line + "\n" for line in kept).encode())


def _lines(file: Path) -> set[str]:
    """The lines of a file that an earlier part of the run wrote."""
    with suppress(OSError):
        return set(file.read_text(encoding="utf-8", errors="replace").splitlines())
    return set()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard")


def _most(reasons: Counter[str]) -> str:
    """The most frequent reason, and how many others there are."""
    (reason, count), others = reasons.most_common(1)[0], len(reasons) - 1
    return f"{count:,} {reason}" + (f", and {others} other reasons" if others else "")


def _shown(metrics: Mapping[str, float], headline: Mapping[str, str] | None) -> str:
    named = headline or {name: name for name in list(metrics)[:MAX_HEADLINE]}
    return "".join(f"{k} {metrics[name]:.4f}  " for k, name in named.items() if name in metrics)


LOSSES = ("text/loss", "image/loss")
WINDOW = 5
"""Reports whose median is the running loss: single spikes do not count."""
FACTOR = 3.0
"""Running loss over its lowest level from which on it counts as high."""
REPORTS = 5
"""Reports in a row with a high loss that are reported as divergence."""
MIN_LEVEL = 0.02
"""Lower levels count as this: a loss near zero triples by chance."""


@dataclass
class _Level:
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    running: float = math.inf
    lowest: float = math.inf
    at_step: int = 0
    above: int = 0

    def add(self, step: int, value: float) -> None:
        self.recent.append(value)
        self.running = median(self.recent)
        if self.running <= self.lowest:
            self.lowest, self.at_step = self.running, step
        high = self.running > FACTOR * max(MIN_LEVEL, self.lowest)
        self.above = self.above + 1 if high else 0


@dataclass
class DivergenceWatch:
    """Watches the losses reported in one stage; one warning per rise."""

    levels: dict[str, _Level] = field(default_factory=dict)

    def look(self, step: int, metrics: Mapping[str, float], stage: StageRecipe) -> str | None:
        """A warning after the report of a step; None while no loss diverges."""
        for name in LOSSES:
            if name not in metrics:
                continue
            level = self.levels.setdefault(name, _Level())
            level.add(step, metrics[name])
            if level.above == REPORTS:
                return _warning(name.partition("/")[0], level, stage)
        return None


def _warning(kind: str, level: _Level, stage: StageRecipe) -> str:
    return (
        f"training diverges: the {kind} loss has been above {FACTOR:g} times its level for "
        f"{level.above} reports ({level.running:.3g} now, {level.lowest:.3g} at step "
        f"{level.at_step:,}). {settings_against_divergence(stage)} Then start again, or resume "
        "from a state of before (--resume DIR)"
    )


def settings_against_divergence(stage: StageRecipe) -> str:
    """Advice: the settings that make a stage more stable, with their values."""
    precision = ', use precision = "float32"' if stage.precision != "float32" else ""
    return (
        f"Lower optimizer.learning_rate ({stage.optimizer.learning_rate:g}) or clip "
        f"({stage.clip:g}), or raise schedule.warmup ({stage.schedule.warmup}){precision}."
    )
