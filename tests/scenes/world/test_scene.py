"""The world: validated configs, unambiguous scenes, draws that depend on seed and index alone."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest

from neounify.data.sample import DataError
from neounify.scenes.world import PRESETS, Scene, SceneObject, is_held_out, sample_rng, sample_scene
from neounify.scenes.world.draw import pick_weighted
from neounify.scenes.world.lexicon import (
    COLOURS,
    MIN_CONTRAST,
    PLACES,
    cell_of_place,
    colour_distance,
    place_name,
    relations_between,
)
from neounify.scenes.world.scene import (
    EXTENT,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    SceneConfig,
    scene_config,
)

DEFAULT = PRESETS["wide"]


def test_colour_names_lie_apart() -> None:
    for a, b in combinations(COLOURS, 2):
        assert colour_distance(COLOURS[a], COLOURS[b]) >= 75, (a, b)


def test_place_names_and_cells_are_inverse() -> None:
    for grid in ((1, 1), (2, 2), (3, 3), (2, 3)):
        names = [place_name((r, c), grid) for r in range(grid[0]) for c in range(grid[1])]
        assert len(set(names)) == grid[0] * grid[1]
        assert set(names) <= set(PLACES)
        for r in range(grid[0]):
            for c in range(grid[1]):
                assert cell_of_place(place_name((r, c), grid), grid) == (r, c)
    assert cell_of_place("centre", (2, 2)) is None


def test_relations_follow_rows_and_columns() -> None:
    assert relations_between((0, 0), (0, 2)) == ("left of",)
    assert relations_between((2, 1), (0, 1)) == ("below",)
    assert relations_between((2, 2), (0, 0)) == ("right of", "below")
    assert relations_between((1, 1), (1, 1)) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": ("circle", "blob")},
        {"colours": ()},
        {"colours": ("red", "red")},
        {"backgrounds": ("mauve",)},
        {"grid": (4, 3)},
        {"max_objects": 10},
        {"max_objects": 0},
        {"side": 16},
        {"small": 0.8, "large": 0.7},
        {"large": 1.0},
        {"jitter": 1.5},
        {"backgrounds": ("white",), "colours": ("white", "red")},
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        replace(DEFAULT, **change)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(DataError, match="easy, default, wide, hard"):
        scene_config("impossible")


def test_objects_may_not_share_a_cell_or_vanish_in_the_background() -> None:
    red = SceneObject("circle", "red", "large", (0, 0))
    with pytest.raises(DataError, match="share a cell"):
        Scene("white", (red, replace(red, colour="blue")))
    with pytest.raises(DataError, match="stand out"):
        Scene("white", (replace(red, colour="white"),))


def test_scenes_with_the_same_objects_are_equal() -> None:
    a = SceneObject("circle", "red", "large", (0, 0))
    b = SceneObject("star", "blue", "small", (2, 1))
    assert Scene("grey", (a, b)) == Scene("grey", (b, a))


@pytest.mark.parametrize("name", PRESETS)
def test_drawn_scenes_are_unambiguous(name: str) -> None:
    config = PRESETS[name]
    for index in range(400):
        scene = sample_scene(sample_rng(1, index), config, split="any")
        assert 1 <= len(scene.objects) <= config.max_objects
        assert scene.background in config.backgrounds
        for placed in scene.objects:
            assert placed.shape in config.shapes
            assert placed.colour in config.colours
            distance = colour_distance(COLOURS[placed.colour], COLOURS[scene.background])
            assert distance >= MIN_CONTRAST
            x, y = config.centre(placed)
            reach = EXTENT * config.radius(placed.size)
            for at, cell, count in (
                (x, placed.cell[1], config.grid[1]),
                (y, placed.cell[0], config.grid[0]),
            ):
                assert cell / count < at - reach
                assert at + reach < (cell + 1) / count


def test_kinds_give_what_they_say() -> None:
    for index in range(100):
        rng = sample_rng(2, index)
        assert len(sample_scene(rng, DEFAULT, "single").objects) == 1
        pair = sample_scene(rng, DEFAULT, "pair").objects
        assert len({o.shape for o in pair}) == len({o.colour for o in pair}) == 2
        group = sample_scene(rng, DEFAULT, "group").objects
        assert len(group) >= 2
        assert len({(o.shape, o.colour, o.size) for o in group}) == 1


def test_known_draws_stay_as_they_are() -> None:
    # Guards every stored run against a change of the drawing code or of numpy's streams.
    drawn = [sample_scene(sample_rng(0, index), DEFAULT) for index in range(3)]
    assert drawn == KNOWN_DRAWS


KNOWN_DRAWS = [
    Scene(
        "white",
        (
            SceneObject("cross", "orange", "small", (0, 2)),
            SceneObject("circle", "pink", "small", (2, 2)),
        ),
    ),
    Scene(
        "black",
        (
            SceneObject("circle", "purple", "small", (0, 0)),
            SceneObject("circle", "purple", "small", (2, 1)),
        ),
    ),
    Scene(
        "white",
        (
            SceneObject("star", "orange", "small", (1, 2)),
            SceneObject("square", "red", "large", (2, 2)),
        ),
    ),
]


def test_a_draw_is_the_same_in_another_process() -> None:
    code = (
        "from neounify.scenes.world import PRESETS, SceneDataset\n"
        "import hashlib\n"
        "data = SceneDataset(7, PRESETS['hard'], chinese=0.3)\n"
        "for i in (40, 3, 1999):\n"
        "    s = data[i]\n"
        "    h = hashlib.sha256(s.text().encode())\n"
        "    [h.update(p.pixels().tobytes()) for p in s.images]\n"
        "    print(h.hexdigest())\n"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 3


def test_training_never_shows_what_is_held_out() -> None:
    seen_pairs, seen_relations = set(), set()
    for index in range(3000):
        scene = sample_scene(sample_rng(3, index), PRESETS["hard"], split="train")
        assert not is_held_out(scene)
        seen_pairs |= {(o.shape, o.colour) for o in scene.objects}
        for a, b in combinations(scene.objects, 2):
            if (a.shape, a.colour) != (b.shape, b.colour):
                for relation in relations_between(a.cell, b.cell):
                    seen_relations.add((a.shape, a.colour, relation))
                for relation in relations_between(b.cell, a.cell):
                    seen_relations.add((b.shape, b.colour, relation))
    assert not seen_pairs & HELD_OUT_PAIRS
    assert not seen_relations & HELD_OUT_RELATIONS
    # Everything else is seen, so a held-out combination is new only as a combination.
    config = PRESETS["hard"]
    possible = {(s, c) for s in config.shapes for c in config.colours} - HELD_OUT_PAIRS
    assert seen_pairs == possible


def test_held_out_scenes_are_found_in_both_ways() -> None:
    pair = Scene("white", (SceneObject("circle", "yellow", "large", (0, 0)),))
    assert is_held_out(Scene("black", pair.objects))
    red, blue = (
        SceneObject("circle", "red", "large", (0, 1)),
        SceneObject("star", "blue", "large", (2, 1)),
    )
    assert is_held_out(Scene("white", (red, blue)))
    below = Scene("white", (replace(red, cell=(2, 1)), replace(blue, cell=(0, 1))))
    assert not is_held_out(below)
    for index in range(100):
        assert is_held_out(sample_scene(sample_rng(4, index), DEFAULT, split="held_out"))


def test_two_red_circles_above_each_other_are_no_held_out_relation() -> None:
    red = SceneObject("circle", "red", "large", (0, 1))
    assert not is_held_out(Scene("white", (red, replace(red, cell=(2, 1)))))


def test_every_preset_has_held_out_combinations() -> None:
    for config in PRESETS.values():
        pairs = [(s, c) for s, c in HELD_OUT_PAIRS if s in config.shapes and c in config.colours]
        assert len(pairs) >= 3


def test_impossible_wishes_end_in_an_error() -> None:
    only = SceneConfig(
        shapes=("circle",), colours=("red", "blue"), backgrounds=("white",), max_objects=1
    )
    with pytest.raises(DataError, match="held_out"):
        sample_scene(sample_rng(0, 0), only, split="held_out")


def test_weighted_draws_follow_their_weights() -> None:
    rng = sample_rng(5, 0)
    weights = {"a": 1.0, "b": 3.0, "never": 0.0}
    drawn = [pick_weighted(rng, weights) for _ in range(4000)]
    assert "never" not in drawn
    assert 0.72 < drawn.count("b") / 4000 < 0.78


def test_streams_of_neighbours_differ() -> None:
    scenes = [sample_scene(sample_rng(0, index), PRESETS["hard"]) for index in range(50)]
    assert sum(a == b for a, b in pairwise(scenes)) <= 2
