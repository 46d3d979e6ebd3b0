"""The checker of clips: it follows shapes, names their motions, and grades what is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from neounify.data import DataError
from neounify.motion.bench.checks import (
    MotionVerdict,
    check_continuation,
    check_motion,
    check_motion_vqa,
    graded,
)
from neounify.motion.bench.follow import fit_motion, follow
from neounify.motion.bench.validation import (
    CHANGES,
    WEARS,
    make_wrong_clip,
    validate_continuation,
    validate_motion,
    validate_motion_answers,
    wear_clip,
)
from neounify.motion.world import (
    MOTION_PRESETS,
    Motion,
    MotionQuestion,
    MotionScene,
    Mover,
    Place,
    motion_facts,
    render_motion,
)
from neounify.motion.world.scene import draw_path
from neounify.scenes.world import sample_rng

DEFAULT = MOTION_PRESETS["default"]


def scene(*motions: Motion, frames: int = 12, seed: int = 0) -> MotionScene:
    """A red star on white, and a blue circle if there are two motions."""
    looks = zip(("star", "circle"), ("red", "blue"), motions, strict=False)
    rng = sample_rng(seed, 77)
    movers = [Mover(s, c, m, draw_path(rng, m, frames)) for s, c, m in looks]
    return MotionScene("white", tuple(movers))


def parts(asked: MotionScene, shown: MotionScene | np.ndarray) -> dict[str, float]:
    clip = render_motion(shown, DEFAULT) if isinstance(shown, MotionScene) else shown
    verdict = check_motion(motion_facts(asked, background=True), clip, DEFAULT)
    assert isinstance(verdict, MotionVerdict)
    assert verdict.correct == all(value == 1 for value in verdict.parts.values())
    assert all(0 <= value <= 1 for value in verdict.parts.values())
    return {name: value for name, value in verdict.parts.items() if value < 1}


@pytest.mark.parametrize("motion", DEFAULT.motions, ids=str)
def test_every_motion_is_recognised(motion: Motion) -> None:
    for seed in range(3):
        seen = follow(render_motion(scene(motion, seed=seed), DEFAULT), DEFAULT)
        assert len(seen.tracks) == 1
        assert fit_motion(seen.tracks[0], seen.frames, DEFAULT).motion == motion


def test_wrong_motions_cost_their_part_alone() -> None:
    left = scene(Motion("move", "left"))
    assert parts(left, left) == {}
    assert parts(left, scene(Motion("move", "right"))) == {"direction": 0}
    diagonal = parts(left, scene(Motion("move", "up left")))
    assert list(diagonal) == ["direction"]
    assert 0.5 < diagonal["direction"] < 0.8
    assert parts(left, scene(Motion("grow"))) == {"kind": 0, "direction": 0}
    assert parts(scene(Motion("grow")), scene(Motion("shrink"))) == {"kind": 0}
    top = scene(Motion("bounce", "top"))
    assert parts(top, scene(Motion("bounce", "left"))) == {"direction": 0}


def test_wrong_looks_cost_their_part_alone() -> None:
    asked = scene(Motion("move", "left"))
    star = asked.movers[0]
    assert parts(asked, asked.swap(star, replace(star, shape="square"))) == {"shape": 0}
    assert parts(asked, asked.swap(star, replace(star, colour="green"))) == {"colour": 0}
    assert parts(asked, replace(asked, background="black")) == {"background": 0}


def test_parts_grow_with_the_share_of_right_frames() -> None:
    asked = scene(Motion("stay"))
    star = asked.movers[0]
    right = render_motion(asked, DEFAULT)
    square = render_motion(asked.swap(star, replace(star, shape="square")), DEFAULT)
    shares = [
        parts(asked, np.concatenate([square[:n], right[n:]])).get("shape", 1.0)
        for n in (1, 4, 8, 12)
    ]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[1:] == pytest.approx([8 / 12 / 0.85, 4 / 12 / 0.85, 0])


def test_two_shapes_are_told_apart_by_their_looks() -> None:
    path = {side: (Place(x, 0.3, 0.14),) * 12 for side, x in (("left", 0.25), ("right", 0.75))}
    down = tuple(Place(0.75, 0.2 + 0.035 * n, 0.14) for n in range(12))
    star = Mover("star", "red", Motion("stay"), path["left"])
    circle = Mover("circle", "blue", Motion("move", "down"), down)
    asked = MotionScene("white", (star, circle))
    assert parts(asked, asked) == {}
    swapped = MotionScene(
        "white",
        (replace(star, path=down), replace(circle, path=path["left"])),
    )
    assert set(parts(asked, swapped)) <= {"kind", "direction", "shape", "colour"}
    assert parts(asked, swapped)
    one_less = parts(asked, MotionScene("white", (circle,)))
    assert one_less["count"] == 0
    assert one_less["shape"] == 0.5


def test_a_blank_clip_and_one_of_noise_are_wrong_in_all_that_was_asked() -> None:
    asked = scene(Motion("move", "left"))
    blank = parts(asked, np.full((12, 64, 64, 3), 255, np.uint8))
    assert set(blank) == {"count", "shape", "colour", "kind", "direction", "path"}
    assert not any(blank.values())
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    assert "kind" in parts(asked, noise)


def test_gaps_split_no_track_and_jumps_do() -> None:
    steps = scene(Motion("stay"))
    star = steps.movers[0]
    gap = (*star.path[:5], None, *star.path[6:])
    seen = follow(render_motion(steps.swap(star, replace(star, path=gap)), DEFAULT), DEFAULT)
    assert [len(track.seen) for track in seen.tracks] == [11]
    jump = (Place(0.2, 0.2, 0.14),) * 6 + (Place(0.8, 0.8, 0.14),) * 6
    seen = follow(render_motion(steps.swap(star, replace(star, path=jump)), DEFAULT), DEFAULT)
    assert [len(track.seen) for track in seen.tracks] == [6, 6]


def test_a_shape_that_appears_where_another_vanished_is_another() -> None:
    still = Place(0.4, 0.4, 0.14)
    cross = Mover("cross", "red", Motion("vanish"), (still,) * 4 + (None,) * 8)
    star = Mover("star", "orange", Motion("appear"), (None,) * 6 + (still,) * 6)
    both = MotionScene("grey", (cross, star))
    seen = follow(render_motion(both, DEFAULT), DEFAULT)
    assert sorted(len(track.seen) for track in seen.tracks) == [4, 6]
    assert parts(both, both) == {}


def test_a_shape_that_does_two_things_does_neither() -> None:
    path = tuple(Place(0.25 + 0.04 * n, 0.5, 0.1 * 1.05**n) for n in range(12))
    both = MotionScene("white", (Mover("star", "red", Motion("move", "right"), path),))
    assert parts(both, both) == {"kind": 0, "direction": 0}


def test_a_continuation_is_compared_frame_by_frame() -> None:
    whole = scene(Motion("move", "right"))
    clip = render_motion(whole, DEFAULT)

    def wrong(frames: np.ndarray) -> dict[str, float]:
        verdict = check_continuation(whole, frames, 4, DEFAULT)
        return {name: value for name, value in verdict.parts.items() if value < 1}

    assert wrong(clip[4:]) == {}
    assert set(wrong(np.repeat(clip[3:4], 8, axis=0))) == {"place"}
    short = wrong(clip[4:10])
    assert short["frames"] == 0
    assert short["count"] == pytest.approx(6 / 8 / 0.85)
    long = wrong(np.concatenate([clip[4:], clip[-1:]]))
    assert long == {"frames": 0}
    grown = scene(Motion("grow"))
    still = np.repeat(render_motion(grown, DEFAULT)[3:4], 8, axis=0)
    frozen = check_continuation(grown, still, 4, DEFAULT)
    assert {name for name, right in frozen.attributes.items() if not right} == {"size"}


def test_a_shape_that_stays_does_not_hide_one_that_stopped() -> None:
    star = Mover("star", "red", Motion("stay"), (Place(0.2, 0.2, 0.14),) * 12)
    path = tuple(Place(0.3 + 0.025 * n, 0.75, 0.14) for n in range(12))
    both = MotionScene("white", (star, Mover("circle", "blue", Motion("move", "right"), path)))
    clip = render_motion(both, DEFAULT)
    frozen = np.repeat(clip[5:6], 6, axis=0)
    assert check_continuation(both, clip[6:], 6, DEFAULT).correct
    wrong = check_continuation(both, frozen, 6, DEFAULT).parts
    assert {name for name, value in wrong.items() if value < 1} == {"place"}


def test_grades_fall_on_a_line() -> None:
    assert [graded(e, 1, 3) for e in (0, 1, 2, 3, 4)] == [1, 1, 0.5, 0, 0]


def test_an_answer_has_a_verdict() -> None:
    question = MotionQuestion("direction", "Which way does the star go?", "left", "left")
    assert check_motion_vqa(question, "It goes left.").correct
    assert not check_motion_vqa(question, "right").correct


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((8, 64, 64, 3), np.float32),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((0, 64, 64, 3), np.uint8),
        [np.zeros((64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)],
    ],
    ids=["floats", "an image", "no frames", "two sizes"],
)
def test_what_is_no_clip_is_refused(frames: object) -> None:
    with pytest.raises(DataError, match="clip"):
        follow(frames, DEFAULT)  # type: ignore[arg-type]


def test_clips_are_judged_as_they_are() -> None:
    rates = validate_motion(DEFAULT, len(CHANGES), seed=1)
    assert {f"wrong {name}" for name in CHANGES} < set(rates)
    assert rates["true"].value == 1
    for name in ("wrong", *WEARS):
        assert rates[name].value >= 0.95, name


def test_continuations_and_answers_are_judged_as_they_are() -> None:
    for name, rate in validate_continuation(DEFAULT, 12, seed=1).items():
        assert rate.value >= 0.9, name
    for name, rate in validate_motion_answers(DEFAULT, 60, seed=1).items():
        assert rate.value == 1, name


def test_every_change_changes_the_clip() -> None:
    names = Counter[str]()
    for turn in range(len(CHANGES)):
        name, asked, wrong = make_wrong_clip(DEFAULT, sample_rng(4, turn), turn)
        assert (wrong.shape != render_motion(asked, DEFAULT).shape) or (
            wrong != render_motion(asked, DEFAULT)
        ).any()
        names[name] += 1
    assert names == dict.fromkeys(CHANGES, 1)


def test_wear_is_mild_and_differs_by_kind() -> None:
    clip = render_motion(scene(Motion("move", "left")), DEFAULT)
    for wear in WEARS:
        worn = wear_clip(clip, wear, sample_rng(0, 0))
        assert worn.shape == clip.shape
        assert worn.dtype == np.uint8
        assert 0 < np.abs(worn.astype(int) - clip).mean() < 25
    shifted = wear_clip(np.full((8, 64, 64, 3), 128, np.uint8), "shift", sample_rng(0, 1))
    assert len(np.unique(shifted.reshape(-1, 3), axis=0)) == 1
