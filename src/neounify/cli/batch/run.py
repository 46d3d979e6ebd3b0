"""A batch from its first line to its summary."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import typer

from neounify.cli.batch.lines import BadLine, Line, count_lines, read_lines
from neounify.cli.batch.results import Results
from neounify.cli.batch.tasks import Outcome, Task
from neounify.cli.command import explain
from neounify.cli.display import Display, Tick
from neounify.cli.errors import WriteError

WINDOW = 16
"""How many batches of lines are looked at together when lines of equal settings are sought."""


@dataclass
class Summary:
    """What became of the lines."""

    done: int = 0
    skipped: int = 0
    failed: list[BadLine] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return self.done + self.skipped + len(self.failed)


class Batch:
    """Does the lines of a file that earlier runs have not done, and records each."""

    def __init__(
        self,
        task: Task[Any],
        results: Results,
        display: Display,
        *,
        batch_size: int,
        debug: bool = False,
    ) -> None:
        self._task, self._results, self._display = task, results, display
        self._batch_size, self._debug = batch_size, debug
        self.summary = Summary()

    def run(self, path: Path, defaults: Any, *, images: bool) -> Summary:
        total = count_lines(path)
        with _resumable(self.summary), self._display.bar(path.name, total, "line") as tick:
            jobs = self._pending(read_lines(path, defaults, images=images))
            while window := list(islice(jobs, WINDOW * self._batch_size)):
                for lines in self._together(window):
                    self._do(lines, tick)
            tick(total)
        return self.summary

    def _pending(self, lines: Iterable[Line[Any] | BadLine]) -> Iterator[Line[Any]]:
        for line in lines:
            if isinstance(line, BadLine):
                self._fail(line)
            elif self._results.take(self._task.job(line)):
                self.summary.skipped += 1
            else:
                yield line

    def _together(self, lines: Sequence[Line[Any]]) -> Iterator[list[Line[Any]]]:
        groups: dict[Hashable, list[Line[Any]]] = {}
        for line in lines:
            groups.setdefault(self._task.group(line), []).append(line)
        for group in groups.values():
            for start in range(0, len(group), self._batch_size):
                yield group[start : start + self._batch_size]

    def _do(self, lines: list[Line[Any]], tick: Tick) -> None:
        try:
            outcomes = self._task.do(lines)
        except (OSError, WriteError):
            raise  # the disk is full, say: no line's fault, and the next would fail too
        except Exception as error:
            if len(lines) > 1:
                for line in lines:
                    self._do([line], tick)
                return
            if self._debug:
                raise
            reason = explain(error) or f"unforeseen: {type(error).__name__}: {error}"
            self._fail(BadLine(lines[0].number, reason, lines[0].id))
            tick(self.summary.seen)
            return
        for line, outcome in zip(lines, outcomes, strict=True):
            self._record(line, outcome)
        tick(self.summary.seen)

    def _record(self, line: Line[Any], outcome: Outcome) -> None:
        self.summary.done += 1
        head = {"line": line.number, "id": line.id, "status": "done", "prompt": line.prompt}
        self._results.append({**head, **outcome, "job": self._task.job(line)})

    def _fail(self, line: BadLine) -> None:
        self.summary.failed.append(line)
        head = {"line": line.number, "id": line.id, "status": "failed"}
        self._results.append({**head, "error": line.reason})


@contextmanager
def _resumable(summary: Summary) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on from here") from None
    except WriteError as error:
        raise WriteError(
            f"{error}\n{summary.done} lines were done in this run and are saved. Free some space; "
            "the same command goes on from here."
        ) from error


def finish(summary: Summary, results: Results, display: Display) -> None:
    """Say how the batch went, every failed line by its number; exit code 1 if there are any."""
    failed = sorted(summary.failed, key=lambda line: line.number)
    counts = [f"{summary.done} done"]
    counts += [f"{summary.skipped} were done before"] if summary.skipped else []
    counts += [f"{len(failed)} failed"] if failed else []
    display.result(f"{', '.join(counts)}; see {results.path}", results.path)
    for line in failed:
        name = f"line {line.number}" + ("" if line.id is None else f" (id {line.id})")
        typer.echo(f"{name}: {line.reason}", err=True)
    display.emit(
        {
            "done": summary.done,
            "skipped": summary.skipped,
            "failed": [{"line": n.number, "id": n.id, "error": n.reason} for n in failed],
            "results": str(results.path),
        }
    )
    if failed:
        raise typer.Exit(1)
