"""A curation from its recipe to shards, table and report; a rerun does what is left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from neounify.curate.copies import Decisions, decide, keeping_ranks
from neounify.curate.executor import Executor, build_executor
from neounify.curate.judge import NUMBERS, REASONS, Judged, judge_part, judge_rows
from neounify.curate.measure import measure_unit, measured_path, measured_settings
from neounify.curate.parts import (
    code_version,
    digest_of,
    part_path,
    read_table,
    write_part,
)
from neounify.curate.recipe import CurateError, CurateRecipe, Known, Source
from neounify.curate.report import PAGE, report_page, thumbnails
from neounify.curate.score import hook_stages, score_unit, scored_path, scored_settings
from neounify.curate.seconds import ALL, Seconds, SecondsLog, Stopwatch
from neounify.curate.tally import Tally, tally_part
from neounify.curate.units import (
    Unit,
    containers_of,
    folder_digest,
    stamp_unit,
    take_inventory,
    units_of,
)
from neounify.curate.vectors import drop_like_vectors
from neounify.curate.write import Outputs, Verdicts, write_unit
from neounify.files import file_sha256, locked_folder, remove_leftovers

WORK, SHARDS, TABLE, SUMMARY = "work", "shards", "table", "summary.json"
REMEDY = "run again: what is done stays"
Result = TypeVar("Result")
Tick = Callable[[int], None]
Bar = Callable[[str, int | None, str], AbstractContextManager[Tick]]
"""A progress bar: (label, total, unit) gives what is called with the number done."""


@dataclass(frozen=True)
class Summary:
    """Counts of a finished curation, by source; `dropped` counts reasons.

    `seconds` are those of workers by stage, of `ALL` what is done over all sources.
    """

    samples: dict[str, int]
    kept: dict[str, int]
    dropped: dict[str, dict[str, int]]
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    damage: tuple[str, ...] = ()


@contextmanager
def no_bar(label: str, total: int | None, unit: str) -> Iterator[Tick]:
    """Progress that is not shown."""
    yield lambda done: None


def curate(
    recipe: CurateRecipe,
    out: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    bar: Bar = no_bar,
) -> Summary:
    """Run a recipe into the folder `out`. The same input gives the same bytes.

    Args:
        recipe: sources and stages.
        out: gets shards/, table/, report.html and work/, which holds parts of a run.
        workers: processes; 1 works in this one.
        ray: "local" or the address of a Ray cluster, for `workers` actors there.
        bar: a progress bar for each pass.

    Raises:
        CurateError: input that cannot be read, a broken hook, a folder that cannot be written.
        FolderInUse: another process works in `out`.
    """
    try:
        with locked_folder(out):
            for name in (WORK, SHARDS, TABLE):
                (out / name).mkdir(exist_ok=True)
                remove_leftovers(out / name, "*")
            executor = build_executor(workers, ray)
            try:
                return _Run(recipe, out, executor, bar).run()
            finally:
                executor.close()
    except OSError as error:
        where = error.filename or out
        raise CurateError(f"{where}: {error.strerror or error}; {REMEDY}") from error


class _Run:
    """One run: its units, and the passes over them.

    `parts` are the names of all parts in use, with their source.
    """

    def __init__(self, recipe: CurateRecipe, out: Path, executor: Executor, bar: Bar) -> None:
        self.recipe, self.out, self.executor, self.bar = recipe, out, executor, bar
        self.work = out / WORK
        self.log = SecondsLog(self.work / "seconds.jsonl")
        self.damage: list[str] = []
        self.parts: dict[str, str] = {}

    def run(self) -> Summary:
        self.units = self._units(self.recipe.sources, "reading")
        measured = self._measure("measuring", self.units, self.recipe)
        judged = self._all("judging", judge_part, [(path, self.recipe) for path in measured])
        self._check_readable(self.recipe.sources, self.units, judged)
        decisions = self._decide(judged, measured)
        scored = self._score(decisions)
        self._drop_scored(decisions, scored)
        self._write(decisions, measured, scored)
        return self._summary()

    def _summary(self) -> Summary:
        """Counts of all parts, checked, and the report page."""
        tally = Tally()
        parts = self._all("counting", tally_part, [(path, self.recipe) for path in self.tables])
        for unit, part in enumerate(parts):
            tally.add(part, unit)
        tally.check(sum(self.sizes))
        wanted: dict[int, set[int]] = {}
        for examples in tally.examples.values():
            for unit, example in examples:
                wanted.setdefault(unit, set()).add(example.number)
        max_bytes = self.recipe.stages.readable.max_bytes
        tasks = [
            (self.units[u], tuple(sorted(numbers)), max_bytes) for u, numbers in wanted.items()
        ]
        small = self._all("drawing examples", thumbnails, tasks)
        images = {
            (unit, number): contents
            for unit, by_number in zip(wanted, small, strict=True)
            for number, contents in by_number.items()
        }
        seconds: dict[str, Seconds] = {}
        for name, spent in self.log.of(self.parts).items():
            seconds.setdefault(self.parts[name], Counter()).update(spent)
        page = report_page(self.recipe, tally, seconds, images, self.damage)
        write_part(self.out / PAGE, lambda aside: _write_text(aside, page))
        summary = Summary(
            samples={name: counts.samples for name, counts in tally.sources.items()},
            kept={name: counts.kept for name, counts in tally.sources.items()},
            dropped={name: dict(sorted(c.reasons.items())) for name, c in tally.sources.items()},
            seconds={name: dict(spent) for name, spent in seconds.items()},
            damage=tuple(self.damage),
        )
        text = json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n"
        write_part(self.out / SUMMARY, lambda aside: _write_text(aside, text))
        return summary

    def _each(
        self, label: str, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Result]]:
        """(number, result) of all tasks as they end, with a progress bar."""
        with self.bar(label, len(tasks), "unit") as tick:
            for count, ended in enumerate(self.executor.run(function, tasks), 1):
                yield ended
                tick(count)

    def _all(
        self, label: str, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]]
    ) -> list[Result]:
        """Results of all tasks in order."""
        results = dict(self._each(label, function, tasks))
        return [results[number] for number in range(len(tasks))]

    def _make(
        self, label: str, function: Callable[..., Seconds], tasks: dict[str, tuple[Any, ...]]
    ) -> None:
        """Run the tasks that make parts, by name, and note the seconds of each."""
        names = list(tasks)
        for number, seconds in self._each(label, function, list(tasks.values())):
            self.log.add(names[number], seconds)

    def _units(self, sources: Sequence[Source], label: str) -> list[Unit]:
        containers = containers_of(sources)
        inventories = self._all(label, take_inventory, [(item,) for item in containers])
        self.damage += [text for inventory in inventories for text in inventory.damage]
        pairs = zip(containers, inventories, strict=True)
        units = [
            unit for item, inventory in pairs for unit in units_of(item, inventory, self.recipe)
        ]
        stamps = self._all(f"{label} images", stamp_unit, [(unit,) for unit in units])
        return [replace(unit, stamp=stamp) for unit, stamp in zip(units, stamps, strict=True)]

    def _measure(self, label: str, units: Sequence[Unit], recipe: CurateRecipe) -> list[Path]:
        """The measured parts of some units; those that are not there are made."""
        settings = measured_settings(recipe)
        paths = [measured_path(unit, settings, self.work) for unit in units]
        self.parts |= {p.name: u.container.source for p, u in zip(paths, units, strict=True)}
        left = {
            path.name: (unit, recipe, path)
            for unit, path in zip(units, paths, strict=True)
            if not path.is_file()
        }
        self._make(label, measure_unit, left)
        return paths

    def _check_readable(
        self, sources: Sequence[Source], units: Sequence[Unit], judged: Sequence[Judged]
    ) -> None:
        """CurateError for a source of which too much cannot be read."""
        unreadable = [n for n, reason in enumerate(REASONS) if reason.startswith("readable.")]
        for source in sources:
            parts = [
                part.early
                for part, unit in zip(judged, units, strict=True)
                if unit.container.source == source.name
            ]
            reasons = np.concatenate([*parts, np.zeros(0, np.int16)])
            count = int(np.isin(reasons, unreadable).sum())
            if count > self.recipe.max_unreadable * len(reasons):
                raise CurateError(
                    f"{count} of {len(reasons)} samples of source {source.name} cannot be read, "
                    f"more than max_unreadable = {self.recipe.max_unreadable:g} of the recipe "
                    f"allows; the parts in {self.work} say why (columns location and detail)"
                )

    def _decide(self, judged: Sequence[Judged], measured: Sequence[Path]) -> Decisions:
        """Copies over all sources, read from their part if nothing has changed."""
        stored, evaluation, stages = self._stored(), self._evaluation(), self.recipe.stages
        digest = digest_of(
            code_version(),
            [path.name for path in measured],
            [stages.exact, stages.near, stages.text, stages.geometry, stages.quality],
            [part.digest() for part in (stored, *evaluation)],
        )
        path = part_path(self.work, "copies", digest, ".npz")
        joined = Judged.joined([*judged, stored])
        self.sizes, self.ids = [len(part) for part in judged], joined.ids
        self.sources = np.repeat([unit.container.source for unit in self.units], self.sizes)
        priority = np.repeat([unit.container.priority for unit in self.units], self.sizes)
        priority = np.concatenate([priority, np.full(len(stored), -1)]).astype(np.int64)
        is_stored = np.arange(len(joined)) >= sum(self.sizes)
        self.rank = keeping_ranks(joined, priority, is_stored)
        if not path.is_file():
            watch = Stopwatch()
            with self.bar("finding copies", None, "step"):
                decisions = decide(
                    joined,
                    self.rank,
                    is_stored,
                    Judged.joined(evaluation) if evaluation else None,
                    self.recipe,
                    self.executor,
                    self.work,
                    watch,
                )
            _save(path, decisions)
            self.log.add(path.name, watch.seconds)
        self.parts[path.name] = ALL
        return _load(path)

    def _stored(self) -> Judged:
        """Kept samples of earlier curations, without reasons."""
        rows: list[dict[str, Any]] = []
        for name in self.recipe.stages.near.stored:
            folder = Path(name)
            paths = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
            if not paths:
                raise CurateError(f"stages.near.stored: there are no tables in {name}")
            for path in paths:
                table = read_table(path, ("id", "reason", "verdict", "images", "text"))
                rows += [row for row in table.to_pylist() if row["verdict"] == "kept"]
        judged = judge_rows(rows, self.recipe)
        judged.early[:], judged.late[:] = 0, 0
        return judged

    def _evaluation(self) -> list[Judged]:
        """Evaluation sets, all of which is measured; known bad images have no part in them."""
        stages = self.recipe.stages
        if not stages.evaluation.enabled or not stages.evaluation.sets:
            return []
        sources = [
            Source(name=f"evaluation-{number}", data=data)
            for number, data in enumerate(stages.evaluation.sets)
        ]
        units = self._units(sources, "reading evaluation sets")
        recipe = replace(
            self.recipe, measure="all", stages=replace(stages, known=Known(enabled=False))
        )
        paths = self._measure("measuring evaluation sets", units, recipe)
        self.parts |= dict.fromkeys((path.name for path in paths), ALL)
        judged = self._all("judging", judge_part, [(path, recipe) for path in paths])
        self._check_readable(sources, units, judged)
        return judged

    def _score(self, decisions: Decisions) -> list[Path] | None:
        """Parts of the hooks' values; None without a hook."""
        if not hook_stages(self.recipe):
            return None
        alive, settings = self._split(decisions.alive), scored_settings(self.recipe)
        paths, left = [], {}
        for unit, mask in zip(self.units, alive, strict=True):
            path = scored_path(unit, mask, settings, self.work)
            paths.append(path)
            self.parts[path.name] = unit.container.source
            if not path.is_file():
                left[path.name] = (unit, mask, self.recipe, path)
        self._make("scoring", score_unit, left)
        return paths

    def _drop_scored(self, decisions: Decisions, scored: list[Path] | None) -> None:
        """Reasons of the hooks, like vectors, and copies of what is unsafe."""
        if scored is None:
            return
        start, vectors, owners = 0, [], []
        for path, size in zip(scored, self.sizes, strict=True):
            for row in read_table(path).to_pylist():
                at = start + row["number"]
                if row["reason"]:
                    decisions.reason[at] = NUMBERS[row["reason"]]
                elif row["embeddings"]:
                    vectors.append(row["embeddings"][0])
                    owners.append(at)
            start += size
        if vectors:
            lengths = sorted({len(vector) for vector in vectors})
            if len(lengths) > 1:
                raise CurateError(f"the hook of stage embeddings gave vectors of {lengths} values")
            order = np.argsort(self.rank[owners])
            drop_like_vectors(
                np.array(vectors, np.float32)[order],
                np.array(owners)[order],
                decisions,
                self.recipe,
            )
        unsafe = np.isin(decisions.reason, [NUMBERS["safety.bound"], NUMBERS["safety.never"]])
        copies = np.flatnonzero((decisions.copy_of >= 0) & unsafe[decisions.copy_of])
        decisions.reason[copies] = decisions.reason[decisions.copy_of[copies]]

    def _write(
        self, decisions: Decisions, measured: Sequence[Path], scored: Sequence[Path] | None
    ) -> None:
        """Shards and table. Their names carry digests of contents, not of times of files."""
        tasks: dict[str, tuple[Any, ...]] = {}
        tables, kept_files = [], set[Path]()
        model = self.recipe.stages.captions.model
        weights = folder_digest(Path(model)) if model and Path(model).is_dir() else model
        # Captions are scored by the hook of stage 10.
        hooks = scored_settings(self.recipe)
        settings = digest_of(self.recipe.stages, self.recipe.seed, weights, code_version(), hooks)
        start = 0
        for number, (unit, size) in enumerate(zip(self.units, self.sizes, strict=True)):
            verdicts = self._verdicts(decisions, start, size)
            start += size
            part = None if scored is None else scored[number]
            parts = [file_sha256(path) for path in (measured[number], part) if path]
            digest = digest_of(unit.digest, parts, verdicts, settings)
            outputs = Outputs(
                part_path(self.out / TABLE, unit.name, digest, ".parquet"),
                part_path(self.out / SHARDS, unit.name, digest, ".tar"),
            )
            tables.append(outputs.table)
            self.parts[outputs.table.name] = unit.container.source
            kept_files |= {outputs.table, outputs.shard}
            if not outputs.exist:
                task = (unit, self.recipe, verdicts, measured[number], part, outputs)
                tasks[outputs.table.name] = task
        for folder in (self.out / TABLE, self.out / SHARDS):
            for path in folder.iterdir():
                if path not in kept_files and path.suffix in (".parquet", ".tar"):
                    path.unlink()  # of other settings
        self._make("writing", write_unit, tasks)
        self.tables = tables

    def _verdicts(self, decisions: Decisions, start: int, size: int) -> Verdicts:
        rows = range(start, start + size)
        keepers = [int(decisions.copy_of[row]) for row in rows]
        return Verdicts(
            reasons=tuple(REASONS[decisions.reason[row]] for row in rows),
            copies=tuple(None if keeper < 0 else self._name(keeper) for keeper in keepers),
            distances=tuple(
                None if np.isnan(decisions.distance[row]) else float(decisions.distance[row])
                for row in rows
            ),
        )

    def _name(self, sample: int) -> str:
        """A sample by source and id."""
        stored = sample >= len(self.sources)
        return f"{'stored' if stored else self.sources[sample]}/{self.ids[sample]}"

    def _split(self, values: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        """Values of all samples by unit."""
        return np.split(values[: sum(self.sizes)], np.cumsum(self.sizes)[:-1])


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _save(path: Path, decisions: Decisions) -> None:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez(file, **vars(decisions))

    write_part(path, write)


def _load(path: Path) -> Decisions:
    try:
        with np.load(path) as arrays:
            return Decisions(arrays["reason"], arrays["copy_of"], arrays["distance"])
    except (OSError, ValueError, KeyError) as error:
        raise CurateError(f"{path} is damaged, remove it and run again: {error}") from error
