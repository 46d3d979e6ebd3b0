"""Reports of SceneBench as JSON and Markdown, and the folder of a run with its contact sheets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neounify.files import write_bytes, write_json
from neounify.image.contact_sheet import contact_sheet
from neounify.scenes.bench.category import Example, Outcome, Pixels, Score
from neounify.scenes.bench.checks import Verdict
from neounify.scenes.bench.plan import PARTS, RELATION_YES_NO, TASKS
from neounify.scenes.bench.prompts import CATEGORIES
from neounify.scenes.bench.wider import wider_names
from neounify.scenes.world.questions import QUESTION_KINDS


@dataclass(frozen=True)
class Report:
    """All scores of a run, with what was measured (`about`: model, seed, world, steps, …).

    `measures`: by category, plain numbers beside the score, such as the seam ratio.
    """

    scores: tuple[Score, ...]
    about: Mapping[str, Any]
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "about": dict(self.about),
            "scores": [s.to_json() for s in self.scores],
            "measures": {category: dict(measured) for category, measured in self.measures.items()},
        }

    def to_markdown(self) -> str:
        """Tables of percentages with 95 % intervals by category, by form, and of the measures.

        The parts "wording" and "sizes" have a table each.
        """
        of_part = {part: [s for s in self.scores if _part(s) == part] for part in ("", *PARTS)}
        tables = [_scores(some) for part, some in of_part.items() if some and not part]
        tables += [self._forms()] * any(s.forms for s in self.scores)
        tables += [_of_part(part, of_part[part]) for part in PARTS if of_part[part]]
        tables += [self._measures()] * bool(self.measures)
        return "\n".join(tables)

    def _forms(self) -> str:
        lines = [_row(["form", "n", "strict, % (95 %)"]), _row(["---", "--:", "---"])]
        for s in self.scores:
            for name, rate in s.forms.items():
                lines.append(_row([f"{s.category}: {name}", str(rate.number), str(rate)]))
        return "\n".join(lines) + "\n"

    def _measures(self) -> str:
        lines = [_row(["measure", "value"]), _row(["---", "--:"])]
        for category, measured in self.measures.items():
            lines += [_row([f"{category}: {name}", f"{v:.3f}"]) for name, v in measured.items()]
        return "\n".join(lines) + "\n"


def _part(score: Score) -> str:
    """The part that a score belongs to; "" for the tasks."""
    part = score.category.split("/")[0]
    return part if part in PARTS else ""


def _of_part(part: str, scores: Sequence[Score]) -> str:
    """The table of a part: a row for each form or size, a column for each task."""
    rates = {tuple(s.category.split("/")[1:]): s.strict for s in scores}
    tasks = list(dict.fromkeys(task for task, _ in rates))
    lines = [_row([part, "n", *(f"{task}, % (95 %)" for task in tasks)])]
    lines.append(_row(["---", "--:", *["---"] * len(tasks)]))
    for form in dict.fromkeys(form for _, form in rates):
        cells = [rates.get((task, form)) for task in tasks]
        number = max(rate.number for rate in cells if rate)
        lines.append(_row([form, str(number), *(str(rate or "") for rate in cells)]))
    return "\n".join(lines) + "\n"


def _scores(scores: Sequence[Score]) -> str:
    """The table of the tasks: a row for each category."""
    names = list(dict.fromkeys(name for s in scores for name in s.attributes))
    parts = [f"{part}, % (95 %)" for part in ("strict", "seen", "held out")]
    head = ["category", "n", *parts, *names]
    lines = [_row(head), _row(["---", "--:", *["---"] * (len(head) - 2)])]
    for s in scores:
        rates = [s.attributes.get(name) for name in names]
        lines.append(
            _row(
                [
                    s.category,
                    str(s.strict.number),
                    *(str(rate or "") for rate in (s.strict, s.seen, s.held_out)),
                    *(f"{100 * rate.value:.1f}" if rate else "" for rate in rates),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


SHOWN = 24
"""Images on a sheet, at most."""
_SIDE, _LINES, _SHEET_WIDTH = 128, 6, 900


def write_folder(
    report: Report,
    outcomes: Sequence[Outcome],
    folder: Path,
    categories: Iterable[str] | None = None,
) -> list[Path]:
    """Write a report and its sheets; the files written.

    Sheets of an earlier run in the same folder go, so that all files are of one run: those of
    `categories`, by default all of SceneBench.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for category in _categories() if categories is None else categories:
        for label in ("right", "wrong"):
            (folder / _sheet_name(category, label)).unlink(missing_ok=True)
    as_json, as_text = folder / "report.json", folder / "report.md"
    write_json(as_json, report.to_json(), indent=1)
    write_bytes(as_text, report.to_markdown().encode())
    return [as_json, as_text, *(path for o in outcomes for path in _write_sheets(o, folder))]


def _write_sheets(outcome: Outcome, folder: Path) -> Iterator[Path]:
    """The first successes and the first failures that have an image."""
    for label, passed in (("right", True), ("wrong", False)):
        chosen = [e for e in outcome.examples if e.verdict.correct == passed]
        tiles = [(tile, _words(e)) for e in chosen if (tile := _tile(e)) is not None][:SHOWN]
        if not tiles:
            continue
        images, words = zip(*tiles, strict=True)
        widest = max(image.shape[1] / image.shape[0] for image in images)
        sheet = contact_sheet(
            images,
            words,
            [passed] * len(tiles),
            columns=max(1, round(_SHEET_WIDTH / (_SIDE * widest + 18))),
            side=_SIDE,
            lines=_LINES,
        )
        path = folder / _sheet_name(outcome.score.category, label)
        sheet.save(path)
        yield path


def _tile(example: Example) -> Pixels | None:
    """Tile of a case on a contact sheet: its image, beside the source image of an edit."""
    if example.image is None or example.source is None:
        return example.image
    bar = np.full((example.source.shape[0], 2, 3), 248, np.uint8)
    return np.concatenate([example.source, bar, example.image], axis=1)


def _words(example: Example) -> str:
    """Label of a tile: what the checker found wrong, the prompt, the answer, the thought.

    The least important comes last, as long labels are cut at the end.
    """
    words = [_minded("wrong", example.verdict), example.asked]
    words += [f"→ {example.answer}"] if example.answer is not None else []
    if example.thought is not None and example.thought_verdict is not None:
        words += [_minded("wrong thought", example.thought_verdict), f"thought: {example.thought}"]
    return " ".join(word for word in words if word)


def _minded(label: str, verdict: Verdict) -> str:
    wrong = [name for name, right in verdict.attributes.items() if not right]
    return f"({label}: {', '.join(wrong)})" if wrong else ""


def _sheet_name(category: str, label: str) -> str:
    return f"{category.replace('/', '-')}-{label}.png"


def _categories() -> list[str]:
    """The categories of all runs of SceneBench."""
    known = [f"paint/{name}" for name in CATEGORIES] + [f"vqa/{kind}" for kind in QUESTION_KINDS]
    known.append(f"vqa/{RELATION_YES_NO}")
    known += [name for part in PARTS for name in wider_names(part)]
    return [*known, *TASKS]
