"""JSONL batches: check the lines, skip what an earlier run did, record the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from neounify.cli.command import CliError, WriteError, explain
from neounify.cli.display import Display, Tick
from neounify.cli.files import append_line
from neounify.cli.lines import IMAGES, BadLine, Line, Options, count_lines, read_lines
from neounify.cli.models import LoadedModel
from neounify.cli.options import BATCH, ChatOptions, GenerateOptions, option
from neounify.errors import NeounifyError

RESULTS = "results.jsonl"
WINDOW = 16
"""Batches of lines that are read ahead to find lines of equal settings."""
MAX_CHECKED = 1000
"""Lines that are checked before the model is loaded; the others are checked in their turn."""
MAX_SECONDS = 5.0
"""Time limit of that check in seconds, as it decodes images."""
MAX_NAMED = 3
"""Unusable lines that an error names one by one."""

_LATER_OPTIONS = ("min_p", "frames", "fps", "max_frames", "tubes")
"""Options younger than the first recorded batches: not part of a job's hash unless they are set."""
_EARLIER_NAMES = {"ClipOptions": "GenerateOptions", "QuestionOptions": "ChatOptions"}
"""What options were called in the hashes of the first recorded batches."""

LineOutcome = dict[str, Any]
"""The record of a line in the results file, without its number and job."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Prompts from a file."""

    input: Annotated[
        Path | None,
        option(
            BATCH,
            "FILE.jsonl",
            "Process a file instead: one JSON object per line with `prompt` and, optionally, "
            "`id`, `images`, `videos` or `condition`, and any option by its name "
            "(`max_new_tokens`). Run the same command again to resume after an interruption. A "
            "line without a seed gets --seed + its line number - 1.",
            "--input",
            "-i",
        ),
    ] = None
    batch_size: Annotated[
        int,
        option(BATCH, "N", "Prompts processed at once, where their settings are equal.", min=1),
    ] = 4


# --- results of earlier runs ---


def job_hash(line: Line[Any], model: LoadedModel) -> str:
    """Hash of a line's job: equal for equal prompts, settings and models."""
    keys = ("fingerprint", "dtype", "lora", "colour_profiles")
    options = dataclasses.asdict(line.options)
    for name in _LATER_OPTIONS:
        if options.get(name) in (None, False):
            options.pop(name, None)
    task = type(line.options).__name__
    document = {
        "id": line.id,
        "prompt": line.prompt,
        "images": line.files.get(IMAGES, ()),
        **{field: names for field, names in line.files.items() if field != IMAGES and names},
        "task": _EARLIER_NAMES.get(task, task),
        "options": options,
        "model": [model.description[key] for key in keys if key in model.description],
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def settings_key(options: GenerateOptions | ChatOptions) -> Hashable:
    """Equal for options that differ in nothing but the seed."""
    return repr(dataclasses.replace(options, seed=0))


class Results:
    """results.jsonl of a folder: one record per line, appended as soon as the line is done."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS
        self._done: Counter[str] = Counter()
        try:
            self._read(folder)
        except OSError as error:
            raise CliError(f"{self.path} cannot be used: {error.strerror or error}") from error

    @property
    def any_done(self) -> bool:
        """Whether an earlier run has finished a line."""
        return sum(self._done.values()) > 0

    def take(self, job: str) -> bool:
        """Whether a job was done before. Equal lines are as many jobs, so each is taken once."""
        if self._done[job] == 0:
            return False
        self._done[job] -= 1
        return True

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        append_line(self.path, line.encode("utf-8", "replace"))

    def _read(self, folder: Path) -> None:
        if not self.path.exists():
            return
        whole = 0
        with self.path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                self._count(raw, folder)
        if whole < self.path.stat().st_size:
            # The last line was cut off while it was written: its job counts as not done.
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _count(self, raw: bytes, folder: Path) -> None:
        try:
            record = json.loads(raw)
        except ValueError:
            return
        if not isinstance(record, dict) or record.get("status") != "done":
            return
        files = record.get("files", [])
        if isinstance(record.get("job"), str) and all((folder / file).exists() for file in files):
            self._done[record["job"]] += 1


def check_lines(
    path: Path,
    defaults: Options,
    check: Callable[[Line[Options]], None],
    display: Display,
    results: Results,
    files: Collection[str] = (),
) -> None:
    """Report on stderr how many lines cannot be processed.

    `check` raises a NeounifyError for a line that would fail. Raises CliError when no line is
    usable and no earlier run has finished any.
    """
    bad: list[BadLine] = []
    usable = results.any_done
    end = time.monotonic() + MAX_SECONDS
    for number, line in enumerate(read_lines(path, defaults, files)):
        if number >= MAX_CHECKED or time.monotonic() > end:
            usable = True
            break
        reason = _problem(line, check)
        if reason is None:
            usable = True
        else:
            bad.append(BadLine(line.number, reason, line.id))
    if not usable:
        named = "\n".join(_names(bad)) or "it has no lines"
        raise CliError(f"--input {path}: no line can be processed\n{named}")
    if bad:
        lines = "1 line" if len(bad) == 1 else f"{len(bad)} lines"
        display.note(f"{lines} of {path} cannot be processed, the first is line {bad[0].number}")


def _problem(line: Line[Any] | BadLine, check: Callable[[Line[Any]], None]) -> str | None:
    if isinstance(line, BadLine):
        return line.reason
    try:
        check(line)
    except NeounifyError as error:
        return str(error)
    return None


def _names(bad: list[BadLine]) -> list[str]:
    named = [f"line {line.number}: {line.reason}" for line in bad[:MAX_NAMED]]
    more = len(bad) - len(named)
    return [*named, f"and {more} more"] if more else named


# --- the run ---


class Task(Protocol):
    """The work on lines of one command. Lines of equal `group` may be processed together."""

    def job(self, line: Line[Any]) -> str:
        """The hash that identifies the line in a later run."""

    def group(self, line: Line[Any]) -> Hashable: ...

    def do(self, lines: Sequence[Line[Any]]) -> list[LineOutcome]:
        """One outcome per line; an exception means that none of them was processed."""


@dataclass
class RunSummary:
    """Counts of a run."""

    done: int = 0
    skipped: int = 0
    failed: list[BadLine] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return self.done + self.skipped + len(self.failed)


class BatchRun:
    """A run over the lines that earlier runs have not finished."""

    def __init__(
        self,
        task: Task,
        results: Results,
        display: Display,
        *,
        batch_size: int,
        debug: bool = False,
    ) -> None:
        self._task, self._results, self._display = task, results, display
        self._batch_size, self._debug = batch_size, debug
        self.summary = RunSummary()

    def run(self, path: Path, defaults: Any, files: Collection[str] = ()) -> RunSummary:
        total = count_lines(path)
        with _resumable(self.summary), self._display.bar(path.name, total, "line") as tick:
            jobs = self._pending(read_lines(path, defaults, files))
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
            raise  # a full disk, for example: the next line would fail too
        except Exception as error:
            if len(lines) > 1:
                for line in lines:
                    self._do([line], tick)
                return
            if self._debug:
                raise
            reason = explain(error) or f"unexpected error: {type(error).__name__}: {error}"
            self._fail(BadLine(lines[0].number, reason, lines[0].id))
            tick(self.summary.seen)
            return
        for line, outcome in zip(lines, outcomes, strict=True):
            self._record(line, outcome)
        tick(self.summary.seen)

    def _record(self, line: Line[Any], outcome: LineOutcome) -> None:
        self.summary.done += 1
        head = {"line": line.number, "id": line.id, "status": "done", "prompt": line.prompt}
        self._results.append({**head, **outcome, "job": self._task.job(line)})

    def _fail(self, line: BadLine) -> None:
        self.summary.failed.append(line)
        head = {"line": line.number, "id": line.id, "status": "failed"}
        self._results.append({**head, "error": line.reason})


@contextmanager
def _resumable(summary: RunSummary) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; run the same command again to resume") from None
    except WriteError as error:
        raise WriteError(
            f"{error}\n{summary.done} lines were done in this run and are saved. Free some space "
            "and run the same command again to resume."
        ) from error


def finish(summary: RunSummary, results: Results, display: Display) -> None:
    """Print the summary and every failed line; exit code 1 if there are any."""
    failed = sorted(summary.failed, key=lambda line: line.number)
    counts = [f"{summary.done} done"]
    counts += [f"{summary.skipped} done in an earlier run"] if summary.skipped else []
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
