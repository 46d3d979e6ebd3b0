"""Metrics of answers against values worked out by hand, and sets in VLMEvalKit's columns."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from neounify.bench import (
    ADAPTERS,
    METRICS,
    BenchError,
    Plan,
    PromptFiles,
    begin,
    question_cases,
    run,
    score_answers,
)
from neounify.bench.cases import table
from neounify.bench.runner import input_images
from support.bench import Painter, solid

OPTIONS = {"A": "red", "B": "green", "C": "blue"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", None),
        ("(B)", "B"),
        ("B. green", "B"),
        ("The answer is B.", "B"),
        ("The correct option is: (C)", "C"),
        ("**Answer: A**", "A"),
        (r"So it must be \boxed{C}.", "C"),
        ("<think>A or B? (B)</think>A", "A"),
        ("It shows green.", "B"),
        ("It is (B), since red is absent", "B"),
        ("red or blue", None),
        ("A cat sits there", None),
        ("A cat is green", "B"),
        ("Both (A) and (B)", None),
        ("", None),
        ("D", None),
    ],
)
def test_choices(answer: str, letter: str | None) -> None:
    for wanted in OPTIONS:
        record = OPTIONS | {"answer": wanted}
        assert METRICS["choice"](answer, record) == float(wanted == letter), answer


@pytest.mark.parametrize(
    ("metric", "answer", "wanted", "value"),
    [
        ("exact", "Yes.", "yes", 1),
        ("exact", "The answer is 42", "42", 1),
        ("exact", "1,200", "1200", 1),
        ("exact", "a red  cat", "Red cat", 1),
        ("exact", "red cats", "red cat", 0),
        ("exact", "two", ["2", "two"], 1),
        ("exact", "5 cm", "5", 1),
        ("exact", "about 5 or 6", "5", 0),
        ("contains", "It says CENTRE here", "['centre']", 1),
        ("contains", "It says centre", ["center", "middle"], 0),
        ("relaxed", "104.9", "100", 1),
        ("relaxed", "95", "100", 1),
        ("relaxed", "94.9", "100", 0),
        ("relaxed", "0.0001", "0", 0),
        ("relaxed", "0", "0", 1),
        ("relaxed", "51%", "0.5", 1),
        ("relaxed", "$3.00", "3", 1),
        ("relaxed", "Brazil", "brazil", 1),
        ("relaxed", "2020", "no", 0),
        ("relaxed", "1e999", "5", 0),
        ("anls", "hello world", "hello world", 1),
        ("anls", "hello word", "Hello world", 1 - 1 / 11),
        ("anls", "kitten", "sitting", 1 - 3 / 7),
        ("anls", "abc", "xyz", 0),
        ("anls", "abcd", "abxy", 0),
        ("anls", "x", ["nothing", "x"], 1),
        ("anls", "", "x", 0),
    ],
)
def test_metrics(metric: str, answer: str, wanted: Any, value: float) -> None:
    assert METRICS[metric](answer, {"answer": wanted}) == pytest.approx(value)


def test_precision_and_formulas() -> None:
    assert METRICS["exact"]("1.449", {"answer": "1.4", "precision": 1.0}) == 1
    assert METRICS["exact"]("1.46", {"answer": "1.4", "precision": "1"}) == 0
    with pytest.raises(BenchError, match="no number of decimals"):
        METRICS["exact"]("1.46", {"answer": "1.4", "precision": "x"})
    formula = {"answer": "x ^ 2", "category": "Handwritten Mathematical Expression Recognition"}
    assert METRICS["contains"]("It is x^2", formula) == 1
    assert METRICS["contains"]("It is X^2", formula) == 0


def test_a_very_long_answer_costs_no_time() -> None:
    assert METRICS["anls"]("a" * 10**6, {"answer": "b"}) == 0


# --- sets ---


def encoded(seed: int) -> str:
    buffer = io.BytesIO()
    solid(seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["\t".join(heads)] + ["\t".join(str(r.get(h, "")) for h in heads) for r in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_tsv_of_vlmevalkit(tmp_path: Path) -> None:
    rows = [
        {
            "index": 10,
            "question": "Colour?",
            "A": "red",
            "B": "blue",
            "answer": "B",
            "image": encoded(3),
        },
        {"index": 11, "question": "And now?", "A": "x", "B": "y", "answer": "A", "image": "10"},
    ]
    rows[0] |= {"category": "colour", "hint": "Look."}
    two = f"['{encoded(4)}', '{encoded(5)}']"
    rows.append({"index": 12, "question": "Two?", "A": "1", "B": "2", "answer": "B", "image": two})
    prompts = PromptFiles(write_tsv(tmp_path / "set.tsv", rows))
    cases = question_cases(prompts, "choice")
    assert [case.id for case in cases] == ["10", "11", "12"]
    assert cases[0].category == "colour"
    assert cases[0].prompt == (
        "Hint: Look.\nColour?\nA. red\nB. blue\nAnswer with the letter of the right option alone."
    )
    shown = [[im.tobytes() for im in input_images(case, tmp_path)] for case in cases]
    assert shown == [
        [solid(3).tobytes()],
        [solid(3).tobytes()],
        [solid(4).tobytes(), solid(5).tobytes()],
    ]
    assert "image" not in cases[0].record


def test_json_lines_with_paths(tmp_path: Path) -> None:
    solid(9).save(tmp_path / "a.png")
    record = {"question": "How many?", "answer": "3", "image_path": ["a.png"], "split": "val"}
    (tmp_path / "set.jsonl").write_text(json.dumps(record))
    (case,) = question_cases(PromptFiles(tmp_path / "set.jsonl"), "exact")
    assert (case.id, case.category) == ("0", "val")
    assert case.prompt.endswith("\nAnswer with a single word, number or phrase.")
    for instruction, prompt in (("", "How many?"), ("Say a number.", "How many?\nSay a number.")):
        (other,) = question_cases(PromptFiles(tmp_path / "set.jsonl"), "exact", instruction)
        assert other.prompt == prompt
    assert input_images(case, tmp_path)[0].tobytes() == solid(9).tobytes()


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        ([{"question": "q"}], "exact", "has no 'answer'"),
        ([{"answer": "A"}], "exact", "has no 'question'"),
        (
            [{"question": "q", "answer": "C", "A": "x", "B": "y"}],
            "choice",
            "none of the options A, B",
        ),
        ([{"question": "q", "answer": "x", "image": "77"}], "exact", "no row has the image '77'"),
        ([{"question": "q", "answer": "x", "image": "[broken"}], "exact", "cannot be read"),
        ([{"index": 1, "question": "q", "answer": "x"}] * 2, "exact", "the same index"),
        ([{"question": "q", "answer": "x"}], "magic", "no metric 'magic'; known are choice"),
    ],
)
def test_sets_that_cannot_be_used(
    rows: list[dict[str, Any]], metric: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if rows[0].get("image") == "[broken":
        path.write_text(json.dumps(rows[0] | {"image": "[" + "x" * 100}))
    with pytest.raises(BenchError, match=message):
        question_cases(PromptFiles(path), metric)


def test_questions_are_asked_and_scored(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    rows = [{"question": f"q {n}", "answer": str(n % 2), "category": f"c{n % 2}"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = question_cases(PromptFiles(path), "contains")  # its prompt is the question alone
    adapter, folder = ADAPTERS["questions"], tmp_path / "run"
    begin(folder, {"benchmark": "questions"}, cases, path)
    run(adapter, cases, Painter(), folder, 0, Plan(folder=tmp_path))
    result = score_answers(cases, folder, "contains")
    assert result.values("contains") == {"0": 1, "1": 1, "2": 0, "3": 0}
    assert result.about["judge"] == {"kind": "metric", "metric": "contains"}


def test_long_cells_are_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = "index\tquestion\n1\t" + "x" * (before + 1) + "\n"
    (record,) = table(text, tmp_path / "set.tsv")
    assert len(record["question"]) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("decimals", ["inf", "nan", "1e400", "two", [1]])
def test_a_precision_that_is_no_number_of_decimals(decimals: Any) -> None:
    with pytest.raises(BenchError, match="is no number of decimals"):
        METRICS["exact"]("1.5", {"answer": "1.25", "precision": decimals})


def test_hostile_lengths_are_not_compared_letter_by_letter() -> None:
    """20,000 against 10⁶ characters would be 2 · 10¹⁰ steps."""
    long = "ab" * 500_000
    assert METRICS["anls"](long, {"answer": long}) == 0
    assert METRICS["anls"]("ab" * 100, {"answer": "ab" * 99 + "ba"}) == pytest.approx(0.99)
    for name in ("exact", "contains", "relaxed"):
        METRICS[name]("answer\n" + "\n" * 10**6 + long, {"answer": long})
