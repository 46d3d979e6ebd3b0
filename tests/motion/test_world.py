"""The world of clips: deterministic, wholly in the frame, apart, split, and put into words."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from neounify.data import DataError
from neounify.motion.world import (
    DIRECTIONS,
    EDGES,
    MOTION_KINDS,
    MOTION_PRESETS,
    Motion,
    MotionFacts,
    MotionScene,
    Mover,
    Place,
    is_held_out,
    motion_caption,
    motion_config,
    motion_facts,
    render_motion,
    sample_motion,
)
from neounify.motion.world.language import draw_facts
from neounify.motion.world.scene import GAP, HELD_OUT_MOTIONS, draw_path
from neounify.scenes.world import COLOURS, PRESETS, Scene, SceneObject, render, sample_rng
from neounify.scenes.world.scene import EXTENT

DEFAULT = MOTION_PRESETS["default"]


def clips(number: int, split: str = "train", world: str = "default") -> list[MotionScene]:
    config = motion_config(world)
    return [sample_motion(sample_rng(1, n), config, split) for n in range(number)]  # type: ignore[arg-type]


def test_a_seed_gives_one_clip() -> None:
    assert clips(20) == clips(20)
    assert sample_motion(sample_rng(2, 0), DEFAULT) != sample_motion(sample_rng(3, 0), DEFAULT)


@pytest.mark.parametrize("world", MOTION_PRESETS)
def test_shapes_stay_in_the_frame_and_apart(world: str) -> None:
    config = motion_config(world)
    lengths, kinds = set[int](), Counter[str]()
    for scene in clips(150, "any", world):
        lengths.add(scene.frames)
        kinds.update(mover.motion.kind for mover in scene.movers)
        assert len({m.shape for m in scene.movers} | {m.colour for m in scene.movers}) == 2 * len(
            scene.movers
        )
        for mover in scene.movers:
            for place in filter(None, mover.path):
                reach = EXTENT * place.radius
                assert reach <= place.x <= 1 - reach
                assert reach <= place.y <= 1 - reach
        for places in zip(*(m.path for m in scene.movers), strict=True):
            if len(places) == 2 and None not in places:
                a, b = places
                gap = math.hypot(a.x - b.x, a.y - b.y) - EXTENT * (a.radius + b.radius)
                assert gap >= GAP - 1e-9
    assert lengths == set(config.lengths)
    assert set(kinds) == set(MOTION_KINDS)


@pytest.mark.parametrize("motion", DEFAULT.motions, ids=str)
def test_a_path_does_what_its_motion_says(motion: Motion) -> None:
    for index in range(20):
        path = draw_path(sample_rng(5, index), motion, 12)
        there = [place for place in path if place is not None]
        first, last = there[0], there[-1]
        absent = [n for n, place in enumerate(path) if place is None]
        if motion.kind == "move":
            x, y = DIRECTIONS[str(motion.way)]
            dx, dy = last.x - first.x, last.y - first.y
            assert dx * x + dy * y == pytest.approx(math.hypot(dx, dy))
            assert 0.3 <= math.hypot(dx, dy) <= 0.5
        elif motion.kind == "bounce":
            x, y = DIRECTIONS[EDGES[str(motion.way)]]
            along = [place.x * x + place.y * y for place in there]
            peak = max(range(12), key=along.__getitem__)
            assert 0 < peak < 11
            assert min(along[peak] - along[0], along[peak] - along[-1]) > 0.1
        elif motion.kind in ("grow", "shrink"):
            ratio = last.radius / first.radius
            assert 1.6 <= (ratio if motion.kind == "grow" else 1 / ratio) <= 1.9
        else:
            assert len(set(there)) == 1
        if motion.kind == "appear":
            assert absent == list(range(len(absent)))
            assert 3 <= len(absent) <= 9
        elif motion.kind == "vanish":
            assert absent == list(range(12 - len(absent), 12))
            assert 3 <= len(absent) <= 9
        else:
            assert not absent


def test_training_never_shows_what_is_held_out() -> None:
    train, held_out = clips(150), clips(150, "held_out")
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
    pairs = {(m.shape, str(m.motion)) for scene in train for m in scene.movers}
    assert not pairs & HELD_OUT_MOTIONS
    motions = {str(m.motion) for scene in clips(400) for m in scene.movers}
    assert motions == {str(motion) for motion in DEFAULT.motions}


def test_a_still_frame_is_what_the_renderer_of_scenes_draws() -> None:
    world = replace(PRESETS["default"], grid=(1, 1), max_objects=1, small=0.3, large=0.4)
    scene = Scene("grey", (SceneObject("star", "blue", "large", (0, 0)),))
    path = (Place(0.5, 0.5, world.radius("large")),) * 8
    clip = render_motion(
        MotionScene("grey", (Mover("star", "blue", Motion("stay"), path),)), DEFAULT
    )
    expected = render(scene, world).astype(int)
    assert np.abs(clip.astype(int) - expected).max() <= 1


def test_shapes_whose_windows_overlap_do_not_erase_each_other() -> None:
    places = (Place(0.4, 0.4, 0.15),) * 8, (Place(0.65, 0.65, 0.15),) * 8
    movers = [
        Mover(shape, colour, Motion("stay"), path)
        for shape, colour, path in zip(("circle", "diamond"), ("red", "blue"), places, strict=True)
    ]
    both = render_motion(MotionScene("white", tuple(movers)), DEFAULT)
    turned = render_motion(MotionScene("white", tuple(movers[::-1])), DEFAULT)
    assert np.abs(both.astype(int) - turned.astype(int)).max() <= 1
    assert (both[0, 25, 25] == COLOURS["red"]).all()
    assert (both[0, 41, 41] == COLOURS["blue"]).all()


def test_a_caption_has_one_meaning() -> None:
    meant: dict[str, MotionFacts] = {}
    for index, scene in enumerate(clips(600, "any")):
        rng = sample_rng(9, index)
        facts = draw_facts(scene, rng)
        text = motion_caption(facts, rng)
        assert meant.setdefault(text, facts) == facts
        for mover in facts.movers:
            assert mover.shape in text
            assert mover.colour is None or mover.colour in text
        assert facts.background is None or f"{facts.background} background" in text
    assert len(meant) > 500


def test_captions_read_as_english() -> None:
    path = (Place(0.5, 0.5, 0.15),) * 8
    movers = (
        Mover("star", "orange", Motion("move", "up left"), path),
        Mover("circle", "red", Motion("bounce", "top"), path),
    )
    scene = MotionScene("white", movers)
    assert (
        motion_caption(motion_facts(scene, background=True))
        == "An orange star moves up and to the left and a red circle bounces off the top edge, "
        "on a white background."
    )
    assert motion_caption(motion_facts(MotionScene("white", movers[1:]), colour=False)) == (
        "A circle bounces off the top edge."
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (4,)}, "lengths"),
        ({"directions": ("left", "left")}, "directions"),
        ({"max_shapes": 3}, "must be 1 or 2"),
        ({"side": 32}, "under 64"),
        ({"shapes": ("hexagon", "star")}, "shapes"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(DEFAULT, **fields)  # type: ignore[arg-type]


def test_wrong_names_are_refused() -> None:
    with pytest.raises(DataError, match="no difficulty 'wide'; there are easy, default, hard"):
        motion_config("wide")
    for kind, way in (("move", None), ("bounce", "up"), ("grow", "left"), ("spin", None)):
        with pytest.raises(DataError, match="no such motion"):
            Motion(kind, way)  # type: ignore[arg-type]
    plain = replace(DEFAULT, shapes=("circle",), colours=("red", "blue"), max_shapes=1)
    with pytest.raises(DataError, match=r"no clip of .* in split 'held_out' in 4000 draws"):
        sample_motion(sample_rng(0, 0), plain, "held_out", kinds=("grow",))
