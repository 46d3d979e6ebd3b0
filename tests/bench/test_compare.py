"""Comparisons of two results: pairs by case, tests, what may not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neounify.bench import BenchError, CaseScore, Result, compare
from neounify.bench.result import macro_mean
from neounify.evaluate.metrics import wilson_interval

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
    with pytest.raises(BenchError, match="no part in common"):
        compare(result({"a": 1.0}), result({"a": 1.0}, "other"))


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
                "about": "x",
                "failures": {},
                "seeds": {},
                "cases": {},
            },
            "not a result",
        ),
        (
            {
                "format": "neounify-bench-result-1",
                "about": {},
                "failures": {},
                "seeds": {},
                "cases": {"c": {"a": {"x": 10**400}}},
            },
            "not a result",
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


def test_what_no_utf8_file_can_hold_is_written_as_its_escape(tmp_path: Path) -> None:
    """A judge that names a part so; everything else must still be written."""
    odd = Result(ABOUT, (CaseScore("a", "c", {"\ud800": 1.0}),), {"b": "\udc80"})
    odd.write(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_bytes())["failures"] == {"b": "\udc80"}


def test_the_interval_of_a_mean_of_categories() -> None:
    """One category is Wilson's interval; of several it holds the true mean as often as it says."""
    one = macro_mean([[1.0] * 7 + [0.0] * 3])
    assert (one.low, one.high) == pytest.approx(wilson_interval(7, 10))
    right = macro_mean([[1.0] * 3, [1.0] * 3])
    low, _ = wilson_interval(3, 3)
    assert (right.value, right.high) == (1, 1)
    assert right.low == pytest.approx(1 - (1 - low) / 2**0.5)
    random, truth = np.random.default_rng(0), (0.95, 0.6, 0.3)
    covered = 0
    for _ in range(1000):
        groups = [(random.random(25) < rate).astype(float).tolist() for rate in truth]
        mean = macro_mean(groups)
        covered += bool(mean.low <= np.mean(truth) <= mean.high)
    assert 0.93 <= covered / 1000 <= 0.975
    graded = macro_mean([[0.5, 0.6, 0.7], [0.2, 0.2, 0.2]])
    assert graded.value == pytest.approx(0.4)
    assert 0.35 <= graded.low < 0.4 < graded.high <= 0.45
