"""Output of a command: results on stdout, notes and progress on stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:  # `--help` does without them
    from rich.console import Console
    from rich.progress import Progress

MIN_TABLE_WIDTH = 76
"""Columns of the tables of results."""

Tick = Callable[[int], None]
"""Called with the number of units done so far."""

FIRST_LINE, NEXT_LINES = 10.0, 30.0
"""Seconds before the first progress line, and between lines, where stderr is no terminal."""


@dataclass
class _Work:
    """One running task."""

    label: str
    total: int | None
    unit: str
    begun: float = field(default_factory=time.monotonic)
    done: int = 0

    def __str__(self) -> str:
        from neounify.terminal import duration

        passed = time.monotonic() - self.begun
        if self.total is None or not self.done:
            return f"{self.label}: {duration(passed)} so far"
        pace = passed / self.done
        left = duration(pace * (self.total - self.done))
        return f"{self.label}: {self.done} of {self.total} {self.unit}s, {left} left"


class _ProgressLines:
    """Periodic progress lines about running tasks, written by a thread."""

    def __init__(self) -> None:
        self._under_way: list[_Work] = []

    @contextmanager
    def work(self, label: str, total: int | None, unit: str) -> Iterator[Tick]:
        """Work whose progress is written; nested work shares the line."""
        work = _Work(label, total, unit)
        self._under_way.append(work)
        ended = threading.Event()
        outermost = len(self._under_way) == 1
        writer = threading.Thread(target=self._write, args=(ended,), daemon=True)
        if outermost:
            writer.start()

        def tick(done: int) -> None:
            work.done = done

        try:
            yield tick
        finally:
            ended.set()
            if outermost:
                writer.join()
            self._under_way.remove(work)

    def _write(self, ended: threading.Event) -> None:
        wait = FIRST_LINE
        while not ended.wait(wait):
            typer.echo("; ".join(map(str, list(self._under_way))), err=True)
            wait = NEXT_LINES


class Display:
    """Output of a command. `quiet` leaves out progress and notes.

    With `json`, stdout gets nothing but the document passed to `emit`.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        from rich.console import Console

        self.quiet = quiet
        self.json = json
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._lines = _ProgressLines()
        self._in_line = False

    def say(self, text: str) -> None:
        """A line for the reader, on stdout."""
        if not self.quiet and not self.json:
            typer.echo(text)

    def result(self, text: str, path: object) -> None:
        """A saved file: a sentence, or the bare path when quiet."""
        if not self.json:
            typer.echo(str(path) if self.quiet else text)

    def note(self, text: str) -> None:
        """A note beside the result, on stderr."""
        if not self.quiet:
            typer.echo(text, err=True)

    @contextmanager
    def deprecations(self) -> Iterator[None]:
        """Write deprecation warnings as notes, which Python hides from users by default."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DeprecationWarning)
            yield
        for warning in caught:
            self.note(str(warning.message))

    def emit(self, document: dict[str, Any]) -> None:
        """The machine-readable result: one line of JSON, only with --json."""
        if self.json:
            typer.echo(json.dumps(document, ensure_ascii=False))

    def write(self, piece: str) -> None:
        """A piece of streamed text, on stdout."""
        if not self.json:
            typer.echo(printable(piece) if sys.stdout.isatty() else piece, nl=False)
            sys.stdout.flush()
            self._in_line = not piece.endswith("\n") if piece else self._in_line

    def end_line(self) -> None:
        """End the current line of streamed text, before a bar is drawn over it."""
        if self._in_line:
            self.write("\n")

    @contextmanager
    def bar(self, label: str, total: int | None = None, unit: str = "step") -> Iterator[Tick]:
        """A progress bar, below those already shown; without a total, the elapsed time.

        Where stderr is no terminal, long work gets a line from time to time instead.
        """
        if self.quiet:
            yield lambda done: None
            return
        if not self._console.is_terminal:
            with self._lines.work(label, total, unit) as tick:
                yield tick
            return
        outermost = self._progress is None
        progress = self._progress or self._start()
        task = progress.add_task(label, total=total, unit=unit)
        try:
            yield lambda done: progress.update(task, completed=done)
        finally:
            progress.remove_task(task)
            if outermost:
                progress.stop()
                self._progress = None

    def _start(self) -> Progress:
        from neounify.terminal import pace_column, progress_bar

        narrow = is_narrow(self._console)
        self._progress = progress_bar(
            self._console, pace_column(), bar=not narrow, redirect_stderr=False
        )
        self._progress.start()
        return self._progress


def printable(text: str) -> str:
    """Text without control characters, which a model may write and which garble a terminal."""
    return "".join(c if c in "\n\t" or (c.isprintable() or c.isspace()) else "\ufffd" for c in text)


def human_bytes(count: int) -> str:
    """1234567 -> '1.2 MB'."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def is_narrow(console: Console) -> bool:
    """Whether a table of several columns would be cut on this terminal."""
    return console.is_terminal and console.width < MIN_TABLE_WIDTH
