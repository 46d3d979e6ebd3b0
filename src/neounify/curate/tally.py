"""Counts of a curation from its table: by source and reason, histograms, other bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neounify.curate.parts import read_table
from neounify.curate.recipe import CurateError, CurateRecipe
from neounify.curate.rules import BOUNDS, Bound, setting
from neounify.curate.write import KEPT, is_unspeakable

BINS = 40
MAX_EXAMPLES = 20
TOKEN_PIXELS = 32 * 32
COLUMNS = ("id", "source", "reason", "verdict", "copy_of", "detail", "images", "text")
SCALES: dict[str, tuple[float, float]] = {
    "geometry.min_side": (0, 2048),
    "geometry.max_aspect": (1, 6),
    "quality.min_sharpness": (0, 2000),
    "quality.min_entropy": (0, 8),
    "quality.min_luma": (0, 255),
    "quality.max_border": (0, 1),
    "text.min_words": (0, 200),
    "text.max_repetition": (0, 1),
    "watermark.bound": (0, 1),
    "beauty.bound": (0, 10),
    "match.bound": (-0.1, 0.5),
}
"""Range of a histogram by the reason of its bound; values beyond are in its outer bins."""


@dataclass(frozen=True)
class Example:
    """A dropped sample: its number in its unit, id, and what it is a copy of, or why it is gone."""

    number: int
    id: str
    note: str


@dataclass
class SourceCounts:
    """Counts of one source: samples, by reason, files and tokens of images, words."""

    samples: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    image_bytes: int = 0
    image_tokens: int = 0
    words: int = 0


@dataclass
class Tally:
    """Counts of some parts of a table.

    `tighter` counts kept samples that each bound one step tighter drops, `looser` those that it
    drops now and would not one step looser; reasons of later stages may then drop them.
    """

    sources: dict[str, SourceCounts] = field(default_factory=dict)
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    tighter: Counter[str] = field(default_factory=Counter)
    looser: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, Example]]] = field(default_factory=dict)
    """By reason: (unit, example)."""

    def add(self, other: Tally, unit: int) -> None:
        """Add the counts of the part of a unit."""
        for name, counts in other.sources.items():
            mine = self.sources.setdefault(name, SourceCounts())
            mine.samples += counts.samples
            mine.kept += counts.kept
            mine.reasons.update(counts.reasons)
            mine.image_bytes += counts.image_bytes
            mine.image_tokens += counts.image_tokens
            mine.words += counts.words
        for name, values in other.histograms.items():
            self.histograms[name] = self.histograms.get(name, 0) + values
        self.tighter.update(other.tighter)
        self.looser.update(other.looser)
        for reason, examples in other.examples.items():
            mine_of = self.examples.setdefault(reason, [])
            mine_of += [(unit, example) for _, example in examples[: MAX_EXAMPLES - len(mine_of)]]

    def check(self, expected: int) -> None:
        """CurateError unless every sample is counted once: in = out + Σ reasons."""
        total = sum(counts.samples for counts in self.sources.values())
        ends = sum(c.kept + c.reasons.total() for c in self.sources.values())
        if not total == ends == expected:
            raise CurateError(
                f"{expected} samples went in, but the table has {total} rows, {ends} of them kept "
                "or with a reason; remove the folder's work/ and table/ and run again"
            )


def tally_part(path: Path, recipe: CurateRecipe) -> Tally:
    """The counts of a part of the table. Raises CurateError."""
    columns = (*COLUMNS, "watermark", "beauty", "match")
    return tally_rows(read_table(path, columns).to_pylist(), recipe)


def tally_rows(rows: Sequence[dict[str, Any]], recipe: CurateRecipe) -> Tally:
    """The counts of rows of the table."""
    tally = Tally()
    values: dict[str, list[float]] = {name: [] for name in SCALES}
    for number, row in enumerate(rows):
        _count(tally.sources.setdefault(row["source"], SourceCounts()), row)
        reason = row["reason"]
        if reason is not None and not is_unspeakable(reason) and not reason.startswith("safety."):
            examples = tally.examples.setdefault(reason, [])
            if len(examples) < MAX_EXAMPLES:
                note = f"copy of {row['copy_of']}" if row["copy_of"] else row["detail"] or ""
                examples.append((0, Example(number, row["id"], note)))
        _try_bounds(tally, row, values, recipe)
    for name, measured in values.items():
        low, high = SCALES[name]
        inside = np.clip(np.array(measured, np.float64), low, high)
        tally.histograms[name] = np.histogram(inside, BINS, (low, high))[0].astype(np.int64)
    return tally


def _count(counts: SourceCounts, row: dict[str, Any]) -> None:
    counts.samples += 1
    if row["reason"] is None:
        counts.kept += 1
    else:
        counts.reasons[row["reason"]] += 1
    for image in row["images"] if row["verdict"] == KEPT else ():
        counts.image_bytes += image["file_bytes"]
        counts.image_tokens += -(-image["width"] * image["height"] // TOKEN_PIXELS)
    if row["verdict"] == KEPT and row["text"]:
        counts.words += row["text"]["words"]


def _try_bounds(
    tally: Tally, row: dict[str, Any], values: dict[str, list[float]], recipe: CurateRecipe
) -> None:
    """Note the values of a row, and whether a bound one step away would change its verdict."""
    for bound in BOUNDS:
        measured = list(_measured(bound, row, recipe))
        if bound.reason in values:
            values[bound.reason] += measured
        limit = setting(recipe.stages, bound)
        if limit is None or not measured:
            continue
        if row["reason"] is None:
            tighter = bound.looser(limit, -1)
            tally.tighter[bound.reason] += any(bound.drops(value, tighter) for value in measured)
        elif row["reason"] == bound.reason:
            looser = bound.looser(limit)
            tally.looser[bound.reason] += not any(bound.drops(value, looser) for value in measured)


def _measured(bound: Bound, row: dict[str, Any], recipe: CurateRecipe) -> Iterable[float]:
    """The values of a row that a bound looks at."""
    stage = getattr(recipe.stages, bound.stage)
    if bound.stage in ("watermark", "beauty", "match"):
        yield from row.get(bound.stage) or ()
        return
    if bound.of_text:
        value = bound.value(row["text"]) if row["text"] else None
        if value is not None:
            yield value
        return
    for image in row["images"]:
        value = bound.value(image) if image["role"] in stage.on else None
        if value is not None:
            yield value
