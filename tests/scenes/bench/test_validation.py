"""The checker is checked at a moderate number; benchmarks/scenebench_validation.py does more."""

from collections import Counter

import numpy as np
import pytest

from neounify.scenes.bench import CATEGORIES, categories
from neounify.scenes.bench.prompts import draw_paint_case
from neounify.scenes.bench.validation import (
    WEARS,
    WRONGS,
    make_wrong,
    validate_answers,
    validate_edits,
    validate_painting,
    wear_out,
)
from neounify.scenes.world import PRESETS, render, sample_rng


@pytest.mark.parametrize(
    ("name", "number"), [("easy", 12), ("default", 20), ("wide", 30), ("hard", 16)]
)
def test_images_are_judged_as_they_are(name: str, number: int) -> None:
    rates = validate_painting(PRESETS[name], number, seed=1)
    assert set(rates) == set(categories(PRESETS[name]))
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for category in rates.values():
        assert category["true"].number == category["wrong"].number == number
        for kind, rate in category.items():
            total[kind] += rate.number
            right[kind] += rate.correct
    assert right["true"] >= 0.98 * total["true"]
    assert right["wrong"] >= 0.98 * total["wrong"]
    assert right["malformed"] >= 0.95 * total["malformed"]
    for wear in WEARS:
        assert right[wear] >= 0.95 * total[wear], wear


def test_texts_are_judged_as_they_are() -> None:
    for kind, rate in validate_answers(PRESETS["hard"], 250, seed=1).items():
        assert rate.number >= 200
        assert rate.value >= 0.98, kind


def test_edits_are_judged_as_they_are() -> None:
    rates = validate_edits(PRESETS["wide"], 60, seed=1)
    for kind, rate in rates.items():
        assert rate.value >= (0.95 if "reached" in kind else 0.98), kind


def test_every_way_of_being_wrong_is_tried_and_changes_the_image() -> None:
    config = PRESETS["wide"]
    tried: Counter[str] = Counter()
    for index in range(30):
        for category in CATEGORIES:
            rng = sample_rng(2, index)
            case = draw_paint_case(category, rng, config)
            wrong = make_wrong(case, config, rng)
            assert wrong is not None
            name, scene = wrong
            assert (render(scene, config) != render(case.scene, config)).any()
            tried[name] += 1
    assert set(tried) == set(WRONGS)


def test_worn_images_differ_by_about_what_they_say() -> None:
    image = np.full((64, 64, 3), 128, np.uint8)
    noisy = wear_out(image, "noise", sample_rng(0, 0)).astype(float)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.05)
    shifted = wear_out(image, "shift", sample_rng(0, 1)).astype(int) - 128
    assert len(np.unique(shifted.reshape(-1, 3), axis=0)) == 1
    assert 0 < np.abs(shifted).max() <= 10
    assert (wear_out(image, "blur", sample_rng(0, 2)) == 128).all()
