"""The endless data set of clips: deterministic, every task well formed, held-out kept out."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from neounify.data import DataError, Sample
from neounify.data.configs import read_data
from neounify.data.sample import SampleClip, SampleImage, SampleText
from neounify.motion.bench.follow import fit_motion, follow
from neounify.motion.world import motion_config
from neounify.motion.world.samples import (
    MAX_QUESTIONS,
    MOTION_TASKS,
    SHOWN_FPS,
    MotionData,
    MotionDataset,
)
from neounify.motion.world.scene import FPS, HELD_OUT_MOTIONS
from neounify.scenes.world.scene import HELD_OUT_PAIRS

DEFAULT = motion_config("default")


def clips(sample: Sample) -> list[SampleClip]:
    parts = [part for turn in sample.turns for part in turn.parts]
    return [part for part in parts if isinstance(part, SampleClip)]


def fingerprint(sample: Sample) -> tuple[str, str, list[bytes]]:
    return sample.task, sample.text(), [clip.pixels().tobytes() for clip in clips(sample)]


def test_access_in_any_order_gives_the_same_samples() -> None:
    one, two = MotionDataset(3, DEFAULT), MotionDataset(3, DEFAULT)
    forward = [fingerprint(one[i]) for i in range(12)]
    assert forward == [fingerprint(two[i]) for i in reversed(range(12))][::-1]
    assert forward == [fingerprint(sample) for sample in islice(iter(one), 12)]
    assert fingerprint(MotionDataset(4, DEFAULT)[0]) != forward[0]


def test_tasks_come_by_weight_and_are_well_formed() -> None:
    tasks = Counter[str]()
    for sample in islice(iter(MotionDataset(0, DEFAULT)), 300):
        tasks[sample.task] += 1
        shown = {clip.role: clip for clip in clips(sample)}
        is_watched = sample.task in ("video_qa", "video_caption")
        assert all(clip.tubes != is_watched for clip in shown.values())
        assert {clip.fps for clip in shown.values()} == {SHOWN_FPS if is_watched else FPS}
        asked, answered = sample.turns[::2], sample.turns[1::2]
        assert not any(part.loss for turn in asked for part in turn.parts)
        assert all(part.loss for turn in answered for part in turn.parts)
        if sample.task == "t2v":
            assert set(shown) == {"target"}
            assert len(shown["target"].pixels()) in DEFAULT.lengths
        elif is_watched:
            assert set(shown) == {"input"}
            assert isinstance(asked[0].parts[0], SampleClip)
            assert 2 * len(shown["input"].pixels()) in DEFAULT.lengths
            assert 1 <= len(answered) <= MAX_QUESTIONS
        else:
            first, rest = len(shown["input"].pixels()), len(shown["target"].pixels())
            assert first % 4 == rest % 4 == 0
            assert first + rest in DEFAULT.lengths
            assert first <= rest
    assert set(tasks) == {name for name, share in MOTION_TASKS.items() if share}
    assert 0.3 < tasks["t2v"] / 300 < 0.5


def test_first_questions_have_the_shares_asked_for() -> None:
    data = MotionDataset(0, DEFAULT, {"video_qa": 1}, questions={"which": 3, "count": 1})
    firsts = Counter[bool]()
    for sample in islice(iter(data), 40):
        question = sample.turns[0].parts[1]
        assert isinstance(question, SampleText)
        is_count = question.text.startswith("How many shapes")
        assert is_count or question.text.startswith(("Which shape", "What shape"))
        firsts[is_count] += 1
    assert 18 < firsts[False] < 40
    with pytest.raises(DataError, match="allows a question of kind 'which'"):
        MotionDataset(0, motion_config("easy"), {"video_qa": 1}, questions={"which": 1})[0]


def test_a_caption_states_all_of_its_clip() -> None:
    data = MotionDataset(0, DEFAULT, {"video_caption": 1}, shown_fps=None)
    for sample in islice(iter(data), 10):
        (caption,) = sample.turns[1].parts
        assert isinstance(caption, SampleText)
        for track in follow(clips(sample)[0].pixels(), DEFAULT).tracks:
            seen = next(iter(track.seen.values()))
            assert str(seen.colour) in caption.text
            assert str(seen.shape) in caption.text


def test_a_frame_is_an_image_of_what_its_caption_says() -> None:
    for sample in islice(iter(MotionDataset(0, DEFAULT, {"t2i": 1})), 20):
        ((caption,), (image,)) = (turn.parts for turn in sample.turns)
        assert isinstance(caption, SampleText)
        assert isinstance(image, SampleImage)
        tracks = follow(image.pixels()[None], DEFAULT).tracks
        seen = {(t.seen[0].colour, t.seen[0].shape) for t in tracks}
        assert caption.text.count(" and ") == max(0, len(seen) - 1)
        assert all(f"{colour} {shape}" in caption.text for colour, shape in seen)
        assert seen or caption.text.startswith("Nothing on a ")


def test_training_shows_nothing_that_is_held_out() -> None:
    for sample in islice(iter(MotionDataset(0, DEFAULT, {"t2v": 1})), 25):
        clip = clips(sample)[0].pixels()
        for track in follow(clip, DEFAULT).tracks:
            seen = next(iter(track.seen.values()))
            motion = fit_motion(track, len(clip), DEFAULT).motion
            assert (seen.shape, seen.colour) not in HELD_OUT_PAIRS
            assert (seen.shape, str(motion)) not in HELD_OUT_MOTIONS


def test_next_frames_go_on_where_the_first_end() -> None:
    for sample in islice(iter(MotionDataset(0, DEFAULT, {"next_frames": 1})), 10):
        first, rest = (clip.pixels().astype(int) for clip in clips(sample))
        within = np.abs(np.diff(first, axis=0)).mean()
        assert np.abs(rest[0] - first[-1]).mean() < 2 * within + 1


def test_a_recipe_names_them() -> None:
    data = read_data(
        {"kind": "motion", "world": "easy", "tasks": {"video_qa": 1}, "shown_fps": 0.0, "seed": 2}
    )
    assert isinstance(data, MotionData)
    assert set(data.tasks_drawn()) == {"video_qa"}
    assert data.image_sizes() == [(64, 64)]
    unseen = data.unseen(1)
    usual = {name for name, share in MOTION_TASKS.items() if share}
    assert {unseen[n].task for n in range(20)} == usual
    sample = data.build()[0]
    assert sample.task == "video_qa"
    assert clips(sample)[0].tubes
    assert len(clips(sample)[0].pixels()) == 8
    images = read_data({"kind": "motion", "tasks": {"next_frames": 1}, "tubes": False}).build()[0]
    assert [clip.tubes for clip in clips(images) if clip.role == "input"] == [False]
    assert isinstance(sample.turns[1].parts[0], SampleText)


def test_wrong_settings_are_refused() -> None:
    for wrong, message in (
        ({"world": "wide"}, "wide"),
        ({"tasks": {"edit": 1}}, "edit"),
        ({"tasks": {"t2v": 0}}, "one share must be above 0"),
        ({"shown_fps": 3.0}, "8 divided by a whole number"),
        ({"questions": {"who": 1.0}}, "questions"),
        ({"questions": {"what": 0.0}}, "one share must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_data({"kind": "motion", **wrong})
    with pytest.raises(DataError, match="tasks of clips"):
        MotionDataset(0, DEFAULT, {"edit": 1})
    with pytest.raises(DataError, match="at least 0"):
        MotionDataset(-1, DEFAULT)
    with pytest.raises(DataError, match="no last sample"):
        MotionDataset(0, DEFAULT)[-1]
