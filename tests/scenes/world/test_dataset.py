"""The endless data set: deterministic access, every task well formed, held-out kept out."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from neounify.data import (
    DataError,
    Sample,
    SampleImage,
    sample_from_record,
)
from neounify.scenes.bench import perceive
from neounify.scenes.bench.prompts import names_held_out
from neounify.scenes.world import PRESETS, SceneDataset, parse_caption, parse_layout
from neounify.scenes.world.samples import MAX_QUESTIONS, TASK_WEIGHTS
from neounify.scenes.world.scene import HELD_OUT_PAIRS
from support.samples import write_sample

DEFAULT = PRESETS["wide"]


def fingerprint(sample: Sample) -> tuple[str, str, list[bytes]]:
    return sample.task, sample.text(), [part.pixels().tobytes() for part in sample.images]


def test_access_in_any_order_gives_the_same_samples() -> None:
    one, two = SceneDataset(3, DEFAULT), SceneDataset(3, DEFAULT)
    forward = [fingerprint(one[i]) for i in range(30)]
    backward = [fingerprint(two[i]) for i in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward == [fingerprint(s) for s in islice(iter(one), 30)]
    assert fingerprint(SceneDataset(4, DEFAULT)[0]) != forward[0]


def test_far_samples_need_no_near_ones() -> None:
    assert SceneDataset(0, DEFAULT)[10**12].turns


def test_tasks_come_by_weight_and_are_well_formed() -> None:
    tasks: Counter[str] = Counter()
    for sample in islice(iter(SceneDataset(0, DEFAULT, chinese=0.2)), 1500):
        tasks[sample.task] += 1
        questions, answers = sample.turns[::2], sample.turns[1::2]
        assert {t.role for t in questions} == {"user"}
        assert {t.role for t in answers} == {"assistant"}
        assert 1 <= len(answers) <= (MAX_QUESTIONS if sample.task == "vqa" else 1)
        asked = [p for turn in questions for p in turn.parts]
        answered = [p for turn in answers for p in turn.parts]
        shown = [p for p in asked if isinstance(p, SampleImage)]
        answer_images = [p for p in answered if isinstance(p, SampleImage)]
        assert len(shown) == (1 if sample.task in ("vqa", "caption", "edit", "edit_think") else 0)
        if sample.task == "interleave":
            assert 2 <= len(answer_images) <= 4
        else:
            assert len(answer_images) == sample.task.startswith(("t2i", "edit"))
        assert all(p.loss for p in answered)
        assert not any(p.loss for p in asked)
        assert sample.task.endswith("_think") == sample.text("assistant").startswith("<think>\n")
    assert set(tasks) == set(TASK_WEIGHTS)
    assert 0.3 < tasks["t2i"] / 1500 < 0.4


def test_questions_about_one_image_are_of_different_kinds() -> None:
    data = SceneDataset(0, DEFAULT, {"vqa": 1})
    texts = [[t.parts[-1].text for t in data[i].turns[::2]] for i in range(200)]  # type: ignore[union-attr]
    assert all(len(set(asked)) == len(asked) for asked in texts)
    assert {len(asked) for asked in texts} == set(range(1, MAX_QUESTIONS + 1))


def test_thoughts_are_layouts_of_the_target_image() -> None:
    data = SceneDataset(1, DEFAULT, {"t2i_think": 1, "edit_think": 1})
    for index in range(60):
        sample = data[index]
        thought = sample.text("assistant").split("</think>")[0].removeprefix("<think>\n")
        scene = parse_layout(thought, DEFAULT)
        seen = perceive(sample.images[-1].pixels(), DEFAULT)
        assert seen.background == scene.background
        assert [(o.shape, o.colour, o.size, o.cell) for o in seen.objects] == [
            (o.shape, o.colour, o.size, o.cell) for o in scene.objects
        ]


def test_training_images_and_prompts_hold_nothing_held_out() -> None:
    data = SceneDataset(2, DEFAULT, {"t2i": 2, "edit": 1, "interleave": 1})
    for index in range(250):
        sample = data[index]
        for part in sample.images:
            pairs = {(o.shape, o.colour) for o in perceive(part.pixels(), DEFAULT).objects}
            assert pairs
            assert not pairs & HELD_OUT_PAIRS
        if sample.task == "t2i":
            assert not names_held_out(parse_caption(sample.text("user")), DEFAULT)


def test_side_and_split_are_settings() -> None:
    data = SceneDataset(0, DEFAULT, {"t2i": 1}, split="held_out", side=96)
    sample = data[0]
    assert sample.images[0].pixels().shape == (96, 96, 3)


def test_samples_can_be_written_and_read(tmp_path: Path) -> None:
    data = SceneDataset(5, DEFAULT, chinese=0.3)
    for index in range(40):
        sample = data[index]
        again = sample_from_record(write_sample(sample, tmp_path, str(index)), tmp_path)
        assert (again.task, again.id, again.text()) == (sample.task, sample.id, sample.text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_weights": {"juggle": 1}}, "juggle"),
        ({"task_weights": {}}, "above 0"),
        ({"task_weights": {"t2i": 0}}, "above 0"),
        ({"task_weights": {"t2i": 1, "vqa": -1}}, "at least 0"),
        ({"seed": -1}, "seed"),
        ({"chinese": 2}, "chinese"),
    ],
)
def test_settings_that_make_no_sense_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SceneDataset(**{"seed": 0, "config": DEFAULT, **arguments})


def test_there_is_no_sample_before_the_first() -> None:
    with pytest.raises(DataError):
        SceneDataset(0, DEFAULT)[-1]
