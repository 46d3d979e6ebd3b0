"""Results: one JSON format for every benchmark, with its scores, intervals and Markdown table.

format      neounify-bench-result-1
about       benchmark, prompts (SHA-256), model (fingerprint), settings, judge, versions
scores      [{category, part, rate or mean, low, high, n}], "all" first
failures    {id: reason} of cases without a score
seeds       {id: [one per sample]}
cases       {category: {id: {part: 0 to 1, the mean of its samples}}}
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neounify.bench.cases import BenchError, Record
from neounify.evaluate.intervals import DRAWS, Mean
from neounify.evaluate.metrics import Rate, wilson_interval
from neounify.files import read_json, write_bytes

FORMAT = "neounify-bench-result-1"
RESULT = "result.json"
MAX_RESULT_BYTES = 2**30
ALL, MACRO = "all", "mean of categories"


@dataclass(frozen=True)
class CaseScore:
    """One case: parts in [0, 1], each the mean of its samples."""

    id: str
    category: str
    scores: Mapping[str, float]
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """The scores of a benchmark by case, and what was measured."""

    about: Mapping[str, Any]
    cases: tuple[CaseScore, ...]
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """Names of the parts that cases have, in order."""
        return list(dict.fromkeys(name for case in self.cases for name in case.scores))

    @property
    def categories(self) -> list[str]:
        """Categories of the cases, in order."""
        return list(dict.fromkeys(case.category for case in self.cases))

    def values(self, part: str, category: str | None = None) -> dict[str, float]:
        """A part of the cases that have it, by case; of one category, or of all."""
        return {
            case.id: case.scores[part]
            for case in self.cases
            if part in case.scores and category in (None, case.category)
        }

    def scores(self) -> list[Record]:
        """Rates with Wilson's interval where all cases are 0 or 1, else means with bootstrap's."""
        rows: list[Record] = []
        several = len(self.categories) > 1
        for part in self.parts:
            rows.append({"category": ALL, "part": part} | summary(self.values(part).values()))
            if several:
                by_category = [list(self.values(part, c).values()) for c in self.categories]
                mean = macro_mean([values for values in by_category if values])
                rows.append({"category": MACRO, "part": part} | mean.to_json())
            for category in self.categories if several else ():
                if values := self.values(part, category):
                    rows.append({"category": category, "part": part} | summary(values.values()))
        return rows

    def to_json(self) -> Record:
        """The result as plain data."""
        return {
            "format": FORMAT,
            "about": dict(self.about),
            "scores": self.scores(),
            "failures": dict(self.failures),
            "seeds": {case.id: list(case.seeds) for case in self.cases if case.seeds},
            "cases": {
                category: {c.id: _rounded(c.scores) for c in self.cases if c.category == category}
                for category in self.categories
            },
        }

    def write(self, path: Path) -> None:
        """Write the result, a line for each score and each case. Raises OSError."""
        document = self.to_json()
        scores = ",\n  ".join(map(_line, document["scores"]))
        document["scores"] = []
        cases = [
            f"  {_line(category)}: {{\n   {_entries(items)}\n  }}"
            for category, items in document.pop("cases").items()
        ]
        seeds = _entries(document.pop("seeds"))
        text = json.dumps(document, ensure_ascii=False, indent=1).removesuffix("\n}")
        text = text.replace(' "scores": []', f' "scores": [\n  {scores}\n ]', 1)
        text += f',\n "seeds": {{\n   {seeds}\n }},\n "cases": {{\n' + ",\n".join(cases)
        # Half a surrogate pair, in what a service says, becomes the escape that JSON has for it.
        write_bytes(path, f"{text}\n }}\n}}\n".encode(errors="backslashreplace"))

    @staticmethod
    def read(path: Path) -> Result:
        """The result in a file, or in the folder of a run. Raises BenchError."""
        path = path / RESULT if path.is_dir() else path
        document = read_json(path, MAX_RESULT_BYTES, BenchError)
        if document.get("format") != FORMAT:
            raise BenchError(f"{path}: format {document.get('format')!r} is not {FORMAT!r}")
        try:
            cases = tuple(
                CaseScore(name, category, _checked(parts), tuple(document["seeds"].get(name, ())))
                for category, items in document["cases"].items()
                for name, parts in items.items()
            )
            result = Result(dict(document["about"]), cases, dict(document["failures"]))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BenchError(f"{path}: not a result: {error!r}") from error
        if len({case.id for case in cases}) < len(cases):
            raise BenchError(f"{path}: two cases have the same id")
        return result

    def to_markdown(self) -> str:
        """A table with a row per category and a column per part, in percent with intervals."""
        parts, rows = self.parts, self.scores()
        cells = {(row["category"], row["part"]): row for row in rows}
        lines = [_row(["category", "n", *(f"{part}, % (95 %)" for part in parts)])]
        lines.append(_row(["---", "--:", *["---"] * len(parts)]))
        for category in dict.fromkeys(row["category"] for row in rows):
            found_rows = [cells.get((category, part)) for part in parts]
            number = max(row["n"] for row in found_rows if row)
            lines.append(_row([category, str(number), *map(percent, found_rows)]))
        return "\n".join(lines) + "\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _entries(items: Mapping[str, Any]) -> str:
    """The entries of an object, one to a line."""
    return ",\n   ".join(f"{_line(name)}: {_line(value)}" for name, value in items.items())


def summary(values: Any) -> Record:
    """The rate or mean of some cases, with its interval."""
    numbers = list(values)
    if set(numbers) <= {0.0, 1.0}:
        return dict(Rate(int(sum(numbers)), len(numbers)).to_json())
    return dict(Mean.of(numbers).to_json())


def macro_mean(groups: Sequence[Sequence[float]], seed: int = 0) -> Mean:
    """The mean of the means of several groups.

    Where all values are 0 or 1, the distances of the means p to the ends l and u of their Wilson
    intervals are squared and added, as in `evaluate.intervals.newcombe`; k is the number of groups:

        low  = mean - sqrt(sum (p - l)²) / k,      high = mean + sqrt(sum (u - p)²) / k

    Else the bootstrap draws within each group.
    """
    mean = statistics.fmean(statistics.fmean(group) for group in groups)
    number = sum(map(len, groups))
    if {value for group in groups for value in group} <= {0.0, 1.0}:
        rates = [Rate(int(sum(group)), len(group)) for group in groups]
        ends = [wilson_interval(rate.correct, rate.number) for rate in rates]
        below = math.hypot(*(rate.value - low for rate, (low, _) in zip(rates, ends, strict=True)))
        above = math.hypot(
            *(high - rate.value for rate, (_, high) in zip(rates, ends, strict=True))
        )
        return Mean(mean, mean - below / len(groups), mean + above / len(groups), number)
    random = np.random.default_rng(seed)
    draws = np.zeros(DRAWS)
    for group in groups:
        values = np.asarray(group)
        for draw in range(DRAWS):
            draws[draw] += values[random.integers(len(values), size=len(values))].mean()
    low, high = np.quantile(draws / len(groups), [0.025, 0.975])
    return Mean(mean, float(low), float(high), number)


def percent(row: Mapping[str, Any] | None) -> str:
    """The cell of a score: percent and interval."""
    if row is None:
        return ""
    value = row.get("rate", row.get("mean"))
    numbers = [f"{100 * float(x):.1f}" for x in (value, row["low"], row["high"])]
    return f"{numbers[0]} ({numbers[1]}–{numbers[2]})"


def versions() -> Record:
    """Versions of what made a result."""
    import PIL
    import torch

    import neounify

    return {
        "neounify": neounify.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    """Parts as short numbers: 1 rather than 1.0, six decimals otherwise."""
    return {n: int(v) if v in (0, 1) else round(v, 6) for n, v in scores.items()}


def _checked(scores: Any) -> dict[str, float]:
    parts = {str(name): float(value) for name, value in scores.items()}
    if not all(math.isfinite(value) and 0 <= value <= 1 for value in parts.values()):
        raise ValueError(f"scores must be from 0 to 1, got {parts}")
    return parts


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
