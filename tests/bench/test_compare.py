"""Comparisons of two results: pairs by case, tests, what may not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neounify.bench import BenchError, CaseScore, Result, compare

ABOUT = {"benchmark": "geneval", "prompts": {"sha256": "ab", "number": 4}, "judge": {"kind": "x"}}


def result(values: dict[str, float], part: str = "correct", **about: Any) -> Result:
    """Cases by id; the category is the first letter."""
    cases = [CaseScore(name, name[0], {part: value}) for name, value in values.items()]
    return Result({**ABOUT, **about}, tuple(cases))


def test_right_and_wrong_cases_are_paired() -> None:
    first = {f"{c}{n}": 1.0 for c in "ab" for n in range(10)}
    second = first | {f"a{n}": 0.0 for n in range(7)} | {"c1": 1.0}
    comparison = compare(result(first), result(second))
    rows = {row.category: row for row in comparison.rows}
    assert list(rows) == ["all", "a", "b"]
    assert rows["all"].difference.value == pytest.approx(7 / 20)
    assert rows["all"].p_value == pytest.approx(2 / 2**7)
    assert rows["b"].difference.value == 0
    assert rows["b"].p_value == 1
    assert (comparison.first_only, comparison.second_only) == (0, 1)
    text = comparison.to_markdown("new", "old")
    assert "| all | correct | 20 | 100.0 (83.9–100.0) | 65.0 (43.3–81.9) | +35.0 (" in text
    assert "1 of old" in text
    assert "McNemar's exact test" in text
    back = compare(result(second), result(first)).rows[0]
    assert back.difference.value == -rows["all"].difference.value
    json.dumps(comparison.to_json())


def test_grades_are_paired() -> None:
    first = {f"a{n}": 0.5 + n / 100 for n in range(30)}
    second = {name: value - 0.1 for name, value in first.items()}
    (row,) = compare(result(first, "score"), result(second, "score")).rows
    assert row.difference.value == pytest.approx(0.1)
    assert row.p_value < 0.001
    assert row.test == "permutation of signs"


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ({"benchmark": "dpg"}, "differ in their benchmark: geneval and dpg"),
        ({"prompts": {"sha256": "cd"}}, "differ in their prompts: ab and cd"),
        ({"judge": {"kind": "y"}}, "differ in their judge"),
    ],
)
def test_what_may_not_be_compared(about: dict[str, Any], named: str) -> None:
    with pytest.raises(BenchError, match=named):
        compare(result({"a": 1.0}), result({"a": 1.0}, **about))


def test_nothing_in_common() -> None:
    with pytest.raises(BenchError, match="no case in common"):
        compare(result({"a": 1.0}), result({"b": 1.0}))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"format": "x"}, "format 'x'"),
        ({"format": "neounify-bench-result-1"}, "not a result"),
        (
            {
                "format": "neounify-bench-result-1",
                "about": {},
                "failures": {},
                "seeds": {},
                "cases": {"c": {"a": {"x": 2}}},
            },
            "from 0 to 1",
        ),
        (
            {
                "format": "neounify-bench-result-1",
                "about": {},
                "failures": {},
                "seeds": {},
                "cases": {"c": {"a": {"x": 1}}, "d": {"a": {"x": 1}}},
            },
            "the same id",
        ),
    ],
)
def test_files_that_are_no_results(document: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(document))
    with pytest.raises(BenchError, match=message):
        Result.read(tmp_path)
