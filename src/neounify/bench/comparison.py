"""Two results of one benchmark, case by case: differences with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neounify.bench.cases import BenchError, Record
from neounify.bench.result import ALL, Result, percent, summary
from neounify.evaluate.intervals import Difference, Paired, PairedMeans

MCNEMAR, PERMUTATION = "McNemar's exact test", "permutation of signs"


@dataclass(frozen=True)
class Row:
    """One part of one category, of the cases that both results have."""

    category: str
    part: str
    first: Record
    second: Record
    difference: Difference
    p_value: float
    test: str

    def to_json(self) -> Record:
        """The row as plain data."""
        return {
            "category": self.category,
            "part": self.part,
            "first": self.first,
            "second": self.second,
            "difference": self.difference.to_json(),
            "p_value": round(self.p_value, 6),
            "test": self.test,
        }


@dataclass(frozen=True)
class Comparison:
    """first - second, with the number of cases that only one of the results has."""

    rows: tuple[Row, ...]
    first_only: int
    second_only: int

    def to_json(self) -> Record:
        """The comparison as plain data."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "first_only": self.first_only,
            "second_only": self.second_only,
        }

    def to_markdown(self, first: str = "A", second: str = "B") -> str:
        """A table with a row per category and part; differences in points."""
        heads = ["category", "part", "n", f"{first}, % (95 %)", f"{second}, % (95 %)"]
        heads += [f"{first} - {second}, points (95 %)", "p"]
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 2}--:|{'---|' * 3}--:|"]
        for row in self.rows:
            p = "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"
            cells = [row.category, row.part, str(row.first["n"]), percent(row.first)]
            lines.append(f"| {' | '.join([*cells, percent(row.second), str(row.difference), p])} |")
        tests = dict.fromkeys(row.test for row in self.rows)
        note = (
            f"{len(self.rows)} paired tests ({', '.join(tests)}), p not corrected for their number"
        )
        if self.first_only or self.second_only:
            alone = f"{self.first_only} cases of {first} alone, {self.second_only} of {second}"
            note += f"; left out: {alone}"
        return "\n".join([*lines, "", f"{note}.", ""])


def compare(first: Result, second: Result) -> Comparison:
    """Compare two results of the same prompts.

    Rates are compared by Newcombe's paired interval and McNemar's exact test, graded cases by the
    bootstrap and a permutation of signs. Raises BenchError for different benchmarks or prompts, or
    other judges, and if no case is in both.
    """
    for key in ("benchmark", "prompts", "judge"):
        one, other = (_identity(result.about.get(key)) for result in (first, second))
        if one != other:
            raise BenchError(f"the results differ in their {key}: {one} and {other}")
    rows: list[Row] = []
    names = [c for c in first.categories if c in second.categories]
    for part in (p for p in first.parts if p in second.parts):
        for category in (None, *(names if len(first.categories) > 1 else ())):
            one, other = first.values(part, category), second.values(part, category)
            if both := [name for name in one if name in other]:
                pair = [one[name] for name in both], [other[name] for name in both]
                rows.append(_row(category or ALL, part, *pair))
    ids = [{case.id for case in result.cases} for result in (first, second)]
    if not rows:
        what = "part" if ids[0] & ids[1] else "case"
        raise BenchError(f"the results have no {what} in common")
    return Comparison(tuple(rows), len(ids[0] - ids[1]), len(ids[1] - ids[0]))


def _row(category: str, part: str, first: Sequence[float], second: Sequence[float]) -> Row:
    sums = summary(first), summary(second)
    if {*first, *second} <= {0.0, 1.0}:
        pairs = Paired.of([value == 1 for value in first], [value == 1 for value in second])
        return Row(category, part, *sums, pairs.difference, pairs.p_value, MCNEMAR)
    means = PairedMeans.of(first, second)
    return Row(category, part, *sums, means.difference, means.p_value, PERMUTATION)


def _identity(value: Any) -> Any:
    """What must be equal of an entry: of prompts their hash, not their place."""
    return value.get("sha256") if isinstance(value, dict) and "sha256" in value else value
