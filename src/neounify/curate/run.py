"""A curation from its recipe to shards, table and report; a rerun does what is left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from neounify.curate.copies import Decisions, decide
from neounify.curate.executor import Executor, build_executor
from neounify.curate.judge import NUMBERS, REASONS, Judged, judge_part, judge_rows
from neounify.curate.measure import measure_unit, measured_path, measured_rows
from neounify.curate.parts import code_version, digest_of, part_path, read_table, write_part
from neounify.curate.recipe import CurateError, CurateRecipe, Known, Source
from neounify.curate.report import PAGE, report_page, thumbnails
from neounify.curate.score import hook_stages, score_unit, scored_path
from neounify.curate.tally import Tally, tally_part
from neounify.curate.units import Unit, containers_of, folder_digest, take_inventory, units_of
from neounify.curate.vectors import drop_like_vectors
from neounify.curate.write import Outputs, Verdicts, write_unit
from neounify.files import locked_folder, remove_leftovers

WORK, SHARDS, TABLE, SUMMARY = "work", "shards", "table", "summary.json"
REMEDY = "run again: what is done stays"
Result = TypeVar("Result")
Tick = Callable[[int], None]
Bar = Callable[[str, int | None, str], AbstractContextManager[Tick]]
"""A progress bar: (label, total, unit) gives what is called with the number done."""


@dataclass(frozen=True)
class Summary:
    """Counts of a finished curation, by source; `dropped` counts reasons."""

    samples: dict[str, int]
    kept: dict[str, int]
    dropped: dict[str, dict[str, int]]
    damage: tuple[str, ...] = field(default=())


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
    """One run: its units, and the passes over them."""

    def __init__(self, recipe: CurateRecipe, out: Path, executor: Executor, bar: Bar) -> None:
        self.recipe, self.out, self.executor, self.bar = recipe, out, executor, bar
        self.work = out / WORK
        self.damage: list[str] = []

    def run(self) -> Summary:
        self.units = self._units(self.recipe.sources, "reading")
        measured = self._measure()
        judged = self._all("judging", judge_part, [(path, self.recipe) for path in measured])
        self._check_readable(judged)
        decisions = self._decide(judged, measured)
        scored = self._score(decisions)
        self._drop_scored(decisions, scored)
        self._write(Judged.joined(judged), decisions, measured, scored)
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
        page = report_page(self.recipe, tally, images, self.damage)
        write_part(self.out / PAGE, lambda aside: _write_text(aside, page))
        summary = Summary(
            samples={name: counts.samples for name, counts in tally.sources.items()},
            kept={name: counts.kept for name, counts in tally.sources.items()},
            dropped={name: dict(sorted(c.reasons.items())) for name, c in tally.sources.items()},
            damage=tuple(self.damage),
        )
        text = json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n"
        write_part(self.out / SUMMARY, lambda aside: _write_text(aside, text))
        return summary

    def _all(
        self, label: str, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]]
    ) -> list[Result]:
        """Results of all tasks in order, with a progress bar."""
        results: dict[int, Result] = {}
        with self.bar(label, len(tasks), "unit") as tick:
            for number, result in self.executor.run(function, tasks):
                results[number] = result
                tick(len(results))
        return [results[number] for number in range(len(tasks))]

    def _units(self, sources: Sequence[Source], label: str) -> list[Unit]:
        containers = containers_of(sources)
        inventories = self._all(label, take_inventory, [(item,) for item in containers])
        self.damage += [text for inventory in inventories for text in inventory.damage]
        pairs = zip(containers, inventories, strict=True)
        return [
            unit for item, inventory in pairs for unit in units_of(item, inventory, self.recipe)
        ]

    def _measure(self) -> list[Path]:
        paths = [measured_path(unit, self.recipe, self.work) for unit in self.units]
        left = [
            (unit, self.recipe, path)
            for unit, path in zip(self.units, paths, strict=True)
            if not path.is_file()
        ]
        self._all("measuring", measure_unit, left)
        return paths

    def _check_readable(self, judged: Sequence[Judged]) -> None:
        """CurateError for a source of which too much cannot be read."""
        unreadable = [n for n, reason in enumerate(REASONS) if reason.startswith("readable.")]
        for source in self.recipe.sources:
            parts = [
                part.early
                for part, unit in zip(judged, self.units, strict=True)
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
        stored, evaluation = self._stored(), self._evaluation()
        settings = [self.recipe.stages.exact, self.recipe.stages.near, self.recipe.stages.text]
        settings += [self.recipe.stages.geometry, self.recipe.stages.quality]
        digest = digest_of(
            code_version(),
            [path.name for path in measured],
            settings,
            [digest_of(part.ids, part.hashes.tobytes().hex()) for part in (stored, *evaluation)],
        )
        path = part_path(self.work, "copies", digest, ".npz")
        joined = Judged.joined([*judged, stored])
        sizes = [len(part) for part in judged]
        if not path.is_file():
            priority = np.repeat([unit.container.priority for unit in self.units], sizes)
            priority = np.concatenate([priority, np.full(len(stored), -1)]).astype(np.int64)
            is_stored = np.arange(len(joined)) >= sum(sizes)
            with self.bar("finding copies", None, "step"):
                decisions = decide(
                    joined,
                    priority,
                    is_stored,
                    Judged.joined(evaluation) if evaluation else None,
                    self.recipe,
                    self.executor,
                    self.work,
                )
            _save(path, decisions)
        decisions = _load(path)
        self.sizes, self.ids = sizes, joined.ids
        self.sources = np.repeat([unit.container.source for unit in self.units], sizes)
        return decisions

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
        stage = self.recipe.stages.evaluation
        if not stage.enabled or not stage.sets:
            return []
        sources = [
            Source(name=f"evaluation-{number}", data=data) for number, data in enumerate(stage.sets)
        ]
        units = self._units(sources, "reading evaluation sets")
        tasks = [(unit, replace(self.recipe, measure="all")) for unit in units]
        return self._all("measuring evaluation sets", _judge_unit, tasks)

    def _score(self, decisions: Decisions) -> list[Path] | None:
        """Parts of the hooks' values; None without a hook."""
        if not hook_stages(self.recipe):
            return None
        alive = self._split(decisions.alive)
        paths, left = [], []
        for unit, mask in zip(self.units, alive, strict=True):
            path = scored_path(unit, mask, self.recipe, self.work)
            paths.append(path)
            if not path.is_file():
                left.append((unit, mask, self.recipe, path))
        self._all("scoring", score_unit, left)
        return paths

    def _drop_scored(self, decisions: Decisions, scored: list[Path] | None) -> None:
        """Reasons of the hooks, and like vectors."""
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
            drop_like_vectors(
                np.array(vectors, np.float32), np.array(owners), decisions, self.recipe
            )

    def _write(
        self,
        judged: Judged,
        decisions: Decisions,
        measured: Sequence[Path],
        scored: Sequence[Path] | None,
    ) -> None:
        tasks, tables, kept_files = [], [], set[Path]()
        model = self.recipe.stages.captions.model
        weights = folder_digest(Path(model)) if model and Path(model).is_dir() else model
        start = 0
        for number, (unit, size) in enumerate(zip(self.units, self.sizes, strict=True)):
            verdicts = self._verdicts(decisions, start, size)
            start += size
            part = None if scored is None else scored[number]
            digest = digest_of(
                [measured[number].name, part and part.name, verdicts],
                [self.recipe.stages, self.recipe.seed, weights],
            )
            outputs = Outputs(
                part_path(self.out / TABLE, unit.name, digest, ".parquet"),
                part_path(self.out / SHARDS, unit.name, digest, ".tar"),
            )
            tables.append(outputs.table)
            kept_files |= {outputs.table, outputs.shard}
            if not outputs.exist:
                tasks.append((unit, self.recipe, verdicts, measured[number], part, outputs))
        for folder in (self.out / TABLE, self.out / SHARDS):
            for path in folder.iterdir():
                if path not in kept_files and path.suffix in (".parquet", ".tar"):
                    path.unlink()  # of other settings
        self._all("writing", write_unit, tasks)
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


def _judge_unit(unit: Unit, recipe: CurateRecipe) -> Judged:
    """The samples of a unit of an evaluation set; known bad images have no part in it."""
    recipe = replace(recipe, stages=replace(recipe.stages, known=Known(enabled=False)))
    return judge_rows([row.values() for row in measured_rows(unit, recipe)], recipe)


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
