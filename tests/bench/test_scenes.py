"""SceneBench in the common format: case by case what the report says in sums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import model_card

from neounify.bench import Result, compare
from neounify.bench.scenes import HELD_OUT, STRICT, scene_result
from neounify.scenes.bench import measure
from neounify.scenes.bench.category import Pixels


class Says:
    """Answers every question with one word."""

    fingerprint = None

    def __init__(self, word: str) -> None:
        self.word = word

    def answer(self, images: Sequence[Pixels | None], questions: Sequence[str]) -> list[str]:
        return [self.word] * len(questions)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not asked here")


def findings(word: str) -> Any:
    return measure(Says(word), tasks=("vqa",), cases_per_category=12)


def test_outcomes_by_case_add_up_to_the_report(tmp_path: Path) -> None:
    measured = findings("yes")
    result = scene_result(measured.outcomes, measured.report.about)
    result.write(tmp_path / "result.json")
    result = Result.read(tmp_path)
    for score in measured.report.scores:
        values = list(result.values(STRICT, score.category).values())
        assert (sum(values), len(values)) == (score.strict.correct, score.strict.number)
        held_out = list(result.values(HELD_OUT, score.category).values())
        wanted = (score.held_out.correct, score.held_out.number) if score.held_out else (0, 0)
        assert (sum(held_out), len(held_out)) == wanted
    assert result.about["prompts"] == {"world": "default", "cases": 12, "seed": 0}
    other = findings("no")
    rows = compare(result, scene_result(other.outcomes, other.report.about)).rows
    exists = next(r for r in rows if (r.category, r.part) == ("vqa/exists", STRICT))
    assert exists.first["correct"] + exists.second["correct"] == 12


def test_the_cards_table_is_that_of_the_recorded_result() -> None:
    page = model_card.PAGE.read_text("utf-8")
    assert model_card.replaced(page) == page, "python -m benchmarks.model_card"
