"""Choice of frames: the recorded rules, and clips whose frames are not evenly spaced."""

import json
from typing import Any

import pytest

from neounify.errors import VideoError
from neounify.video.choice import (
    FrameChoice,
    Timeline,
    at_rate,
    consecutive,
    dense,
    published,
)
from support.golden import golden_path

TRAINING_FPS = 24.0
"""The published rate of training clips."""


def steady(frames: int, fps: float) -> Timeline:
    """A clip with all frames equally long."""
    return Timeline([number / fps for number in range(frames)], frames / fps)


def recorded(group: str) -> list[dict[str, Any]]:
    path = golden_path("pixelumm", "fixtures", "common", "frames.json")
    cases: list[dict[str, Any]] = json.loads(path.read_text())[group]
    assert cases
    return cases


def test_the_command_takes_the_recorded_frames() -> None:
    for case in recorded("command"):
        assert published(steady(case["frames"], case["fps"])) == case["indices"], case


def test_the_dense_route_takes_the_recorded_frames() -> None:
    for case in recorded("dense"):
        clip = steady(case["frames"], case["fps"])
        frames = dense(clip, 4)
        if case["mode"] == "sparse_frame_image":
            assert frames is None, case
            assert published(clip) == case["indices"], case
        else:
            assert frames is not None
            indices = case["indices"]  # recorded before the last tube is filled
            assert frames == indices + indices[-1:] * (-len(indices) % 4), case


def test_training_takes_the_recorded_frames() -> None:
    for case in recorded("train"):
        clip = steady(case["frames"], case["fps"])
        assert consecutive(clip, TRAINING_FPS) == case["indices"], case


def test_frames_of_changing_length_are_taken_by_their_times() -> None:
    clip = Timeline([0, 0.1, 0.2, 0.9, 2.5, 2.6, 4.0], 5.0)
    assert at_rate(clip, 1) == [0, 3, 5, 6]  # at 0, 1, 2 (again frame 3), 3, 4
    assert at_rate(clip, 10, max_frames=3) == [0, 4, 6]  # at 0, 2 and 4


def test_a_long_clip_of_changing_length_is_covered_evenly_in_time() -> None:
    """A second of 60 frames, and then one frame a second."""
    clip = Timeline([n / 60 for n in range(60)] + [float(n) for n in range(1, 60)], 60.0)
    assert at_rate(clip, 10, max_frames=4) == [0, 79, 98, 118]  # at 0, 19.67, 39.33 and 59
    assert published(clip, max_frames=60) == [0, *range(60, 119)]
    assert Timeline([0.0, 0.5, 9.5, 10.0], 10.5).evenly(3) == [0, 2, 3]  # the later of two
    assert Timeline([0.0, 0.1, 0.2, 9.0, 9.1, 9.2], 9.3).evenly(5) == [0, 2, 3, 5]


@pytest.mark.parametrize("fps", [23.976, 25, 29.97, 59.94])
def test_rounded_times_of_a_constant_rate_are_covered_as_exact_ones(fps: float) -> None:
    for frames in (97, 1000, 1437):
        times = [round(number / fps, 3) for number in range(frames)]
        rounded = Timeline(times, frames / fps, rounding=0.0005)
        exact = [int(number * (frames - 1) / 95 + 0.5) for number in range(96)]
        assert rounded.evenly(96) == steady(frames, fps).evenly(96) == exact


@pytest.mark.parametrize("seconds", [5, 10, 24, 30, 300])
def test_a_smaller_limit_never_means_more_frames(seconds: int) -> None:
    clip, counts = steady(24 * seconds, 24), []
    for most in (1, 4, 8, 10, 16, 32, 64, 96, 200):
        frames = published(clip, most)
        assert len(frames) <= most
        counts.append(len(frames))
    assert counts == sorted(counts)
    if seconds <= 24:
        assert published(clip, 32) == published(clip) == list(range(0, 24 * seconds, 24))


def test_times_that_a_file_rounds_still_show_their_frame() -> None:
    times = [round(number / 30, 3) for number in range(60)]  # Matroska counts milliseconds
    exact = at_rate(steady(60, 30), 24)
    assert at_rate(Timeline(times, 2.0, rounding=0.0005), 24) == exact
    assert at_rate(Timeline(times, 2.0), 24) != exact


def test_one_frame_is_taken_whatever_the_rate() -> None:
    for choice in (FrameChoice(), FrameChoice(fps=0.01), FrameChoice(fps=24, max_frames=1)):
        assert choice.take(Timeline([0.0], 0.04)) == ([0], False)


def test_one_frame_of_many_is_the_first() -> None:
    assert FrameChoice(max_frames=1).take(steady(100, 4)) == ([0], False)


def test_tubes_are_taken_where_their_rule_applies() -> None:
    choice = FrameChoice(tubes=4)
    assert choice.take(steady(96, 24)) == (list(range(0, 96, 6)), True)
    assert choice.take(steady(577, 24)) == (published(steady(577, 24)), False)
    assert FrameChoice(tubes=2).take(steady(5, 4)) == ([0, 1, 2, 3, 4, 4], True)
    assert FrameChoice(tubes=8).take(steady(4, 4)) == ([0], False)
    assert FrameChoice(tubes=4, fps=12).take(steady(24, 24)) == (list(range(0, 24, 2)), True)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates_are_refused(fps: float) -> None:
    with pytest.raises(VideoError, match="fps must be a finite number above 0"):
        FrameChoice(fps=fps)


def test_no_frames_at_all_are_refused() -> None:
    with pytest.raises(
        VideoError, match="max_frames must be a whole number from 1 to 500,000, got 0"
    ):
        FrameChoice(max_frames=0)


@pytest.mark.parametrize(("frames", "fps"), [(92, 23), (120, 30), (240, 60), (960, 240)])
def test_a_clip_to_generate_fills_whole_tubes(frames: int, fps: float) -> None:
    """The last frames that fill no tube are left out; the published sources have 23 to 60 fps."""
    chosen = consecutive(steady(frames, fps), 24, multiple=4)
    assert len(chosen) == min(frames, 96)
    assert chosen == sorted(set(chosen))
    assert consecutive(steady(frames - 1, fps), 24, multiple=4)[-1] <= frames - 2
    assert len(consecutive(steady(frames - 1, fps), 24, multiple=4)) % 4 == 0


def test_a_longer_clip_to_generate_is_refused_or_cut() -> None:
    for fps in (23.976, 24, 60):
        clip = steady(round(10 * fps), fps)
        with pytest.raises(VideoError, match=r"lasts 10\.0 seconds, 24[01] frames at 24 a second"):
            consecutive(clip, 24)
        first = consecutive(clip, 24, 96, 4, cut=True)
        assert len(first) == 96
        assert abs(first[-1] - 95 * fps / 24) <= 1


def test_a_clip_to_generate_is_not_shown_too_fast() -> None:
    for clip in (steady(60, 12), steady(90, 22), Timeline([0, 0.1, 0.2, 0.9, 2.5, 4.0], 5.0)):
        with pytest.raises(VideoError, match=r"frames a second, and 24 are taken"):
            consecutive(clip, 24)
    with pytest.raises(VideoError, match="has 3 frames at 24 a second, fewer than the 4 of a tube"):
        consecutive(steady(3, 24), 24, multiple=4)
    with pytest.raises(VideoError, match="consecutive frames need fps"):
        FrameChoice(multiple=4)
