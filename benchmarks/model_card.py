"""`python -m benchmarks.model_card`: the scores in docs/model-card.md, from recorded results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from neounify.bench import Result
from neounify.bench.result import percent, summary
from neounify.bench.scenes import HELD_OUT, STRICT

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "model-card.md"
RESULTS = ROOT / "benchmarks" / "results"
BUNDLED = RESULTS / "scenebench.json"
"""The bundled model, case by case; `neounify eval` writes it as result.json."""
OTHERS = {
    "the base, 80 evaluations": RESULTS / "scenebench" / "base-again-80.json",
    "weights before, 80 evaluations": RESULTS / "scenebench" / "before-80.json",
}
FIRST = 6
"""Categories that GenEval has too, whose mean is the last row."""


def table() -> str:
    """Markdown: a row per category, the bundled model with intervals, the others' rates."""
    result = Result.read(BUNDLED)
    others = [_rates(path) for path in OTHERS.values()]
    lines = [
        _row(["category", "8 evaluations, % (95 %)", "held out, % (95 %)", *OTHERS]),
        _row(["---", "---", "---", *["--:"] * len(OTHERS)]),
    ]
    for category in result.categories:
        strict = summary(result.values(STRICT, category).values())
        held_out = result.values(HELD_OUT, category)
        cells = [percent(strict), percent(summary(held_out.values())) if held_out else ""]
        lines.append(_row([category, *cells, *(_percent(rates, [category]) for rates in others)]))
    first = result.categories[:FIRST]
    bundled = {c: summary(result.values(STRICT, c).values())["rate"] for c in first}
    means = [_percent(rates, first) for rates in (bundled, *others)]
    lines.append(_row(["mean of the first six", means[0], "", *means[1:]]))
    return "\n".join(lines)


def replaced(page: str) -> str:
    """The page with the table in place of its own."""
    start = page.index("| category | 8 evaluations")
    return page[:start] + table() + page[page.index("\n\n", start) :]


def _rates(path: Path) -> dict[str, float]:
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {score["category"]: score["strict"]["rate"] for score in report["scores"]}


def _percent(rates: dict[str, float], categories: list[str]) -> str:
    """The mean of some rates in percent; empty if one was not measured."""
    if not all(category in rates for category in categories):
        return ""
    return f"{100 * statistics.fmean(rates[category] for category in categories):.1f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text("utf-8")), "utf-8")
