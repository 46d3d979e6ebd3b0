"""Intervals, counts, tables and the sheet of images."""

import json

import numpy as np
import pytest

from neounify.data.sample import DataError
from neounify.errors import ImageError, RequestError
from neounify.scenes.bench import (
    Rate,
    Report,
    Verdict,
    contact_sheet,
    score,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (170, 200, 0.7939, 0.8930),
    ],
)
def test_wilson_intervals_are_those_of_the_tables(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-4)


def test_wilson_needs_a_rate() -> None:
    for successes, trials in ((1, 0), (3, 2), (-1, 4)):
        with pytest.raises(RequestError):
            wilson_interval(successes, trials)


def verdicts() -> list[Verdict]:
    good = Verdict({"count": True, "colour": True})
    off = Verdict({"count": True, "colour": False})
    return [good, good, off, Verdict({"count": False})]


def test_scores_count_strictly_by_attribute_and_held_out() -> None:
    result = score("colours", verdicts(), [False, True, True, False])
    assert result.strict == Rate(2, 4)
    assert result.held_out == Rate(1, 2)
    assert result.attributes == {"count": Rate(3, 4), "colour": Rate(2, 3)}
    assert score("colours", verdicts(), [False] * 4).held_out is None
    with pytest.raises(DataError, match="colours"):
        score("colours", verdicts(), [True])


def test_a_report_is_json_and_one_table() -> None:
    report = Report((score("colours", verdicts(), [False, True, True, False]),), {"seed": 3})
    data = json.loads(json.dumps(report.to_json()))
    assert data["about"] == {"seed": 3}
    assert data["scores"][0]["strict"]["rate"] == 0.5
    assert data["scores"][0]["attributes"]["colour"]["n"] == 3
    lines = report.to_markdown().splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert "50.0 (15.0–85.0)" in lines[2]


def test_forms_split_the_strict_rate() -> None:
    forms = ["move", "remove", "remove", "remove"]
    result = score("edit", verdicts(), [False] * 4, forms)
    assert result.forms == {"move": Rate(1, 1), "remove": Rate(1, 3)}
    report = Report((result, score("caption", verdicts(), [False] * 4)), {})
    data = json.loads(json.dumps(report.to_json()))["scores"]
    assert data[0]["forms"]["remove"]["correct"] == 1
    assert data[1]["forms"] == {}
    assert "| edit: remove | 3 | 33.3 (6.1–79.2) |" in report.to_markdown().splitlines()
    with pytest.raises(DataError, match="4 verdicts for 4 cases, 1 forms"):
        score("edit", verdicts(), [False] * 4, ["move"])


def test_the_sheet_frames_right_and_wrong() -> None:
    images = [np.full((64, 64, 3), 77, np.uint8)] * 3
    sheet = np.asarray(contact_sheet(images, ["one", "two", "three"], [True, False, True], 2, 64))
    assert tuple(sheet[12, 12]) == (30, 150, 60)
    assert tuple(sheet[12, 12 + 64 + 8 + 10]) == (205, 45, 45)
    assert tuple(sheet[40, 40]) == (77, 77, 77)
    with pytest.raises(ImageError, match="3 images"):
        contact_sheet(images, ["one"], [True])
