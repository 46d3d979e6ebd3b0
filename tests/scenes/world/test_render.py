"""Rendering: right colours in the right places, smooth edges, any side."""

import math

import numpy as np
import pytest
from PIL import Image

from neounify.data.sample import DataError
from neounify.scenes.world import (
    COLOURS,
    PRESETS,
    SHAPES,
    Scene,
    SceneObject,
    render,
    sample_rng,
    sample_scene,
)
from neounify.scenes.world.render import POLYGONS, coverage, signed_distance

DEFAULT = PRESETS["wide"]


def test_background_fills_an_empty_scene() -> None:
    image = render(Scene("grey"), DEFAULT)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert (image == COLOURS["grey"]).all()


def test_each_object_lies_in_its_cell_alone() -> None:
    for row in range(3):
        for column in range(3):
            scene = Scene("white", (SceneObject("square", "blue", "large", (row, column)),))
            covered = (render(scene, DEFAULT, 96) != 255).any(-1)
            ys, xs = np.nonzero(covered)
            assert row * 32 <= ys.min() <= ys.max() < (row + 1) * 32
            assert column * 32 <= xs.min() <= xs.max() < (column + 1) * 32
            assert (
                tuple(render(scene, DEFAULT, 96)[row * 32 + 16, column * 32 + 16])
                == COLOURS["blue"]
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_covered_area_is_the_shapes_area(shape: str) -> None:
    at = (np.arange(200, dtype=np.float32) - 99.5).astype(np.float32)
    area = float(coverage(shape, at[None, :], at[:, None], 60.0).sum()) / 60**2
    if shape == "circle":
        true_area = math.pi
    elif shape == "ring":
        true_area = math.pi * (1 - 0.52**2)
    else:
        x, y = np.array(POLYGONS[shape]).T
        true_area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    assert area == pytest.approx(true_area, rel=0.01)


def test_signed_distance_of_a_square_is_exact() -> None:
    x = np.array([0.0, 0.88, 1.88, 1.88], np.float32)
    y = np.array([0.0, 0.0, 0.0, 1.88], np.float32)
    expected = [-0.88, 0.0, 1.0, math.sqrt(2)]
    assert signed_distance("square", x, y) == pytest.approx(expected, abs=1e-5)


def test_edges_are_smooth() -> None:
    scene = Scene("white", (SceneObject("circle", "black", "large", (1, 1)),))
    grey = render(scene, PRESETS["hard"], 96)[..., 0]
    between = (grey > 30) & (grey < 240)
    # About one pixel of ramp along the circumference, and nothing between elsewhere.
    circumference = 2 * math.pi * PRESETS["hard"].radius("large") * 96
    assert 0.6 * circumference < between.sum() < 1.8 * circumference


@pytest.mark.parametrize("side", [96, 128, 200])
def test_larger_images_show_the_same_scene(side: int) -> None:
    scene = sample_scene(sample_rng(0, 5), DEFAULT)
    small = np.asarray(Image.fromarray(render(scene, DEFAULT, side)).resize((64, 64))).astype(float)
    assert np.abs(small - render(scene, DEFAULT)).mean() < 3


def test_images_of_one_scene_are_equal_and_not_shared() -> None:
    scene = sample_scene(sample_rng(0, 6), DEFAULT)
    first = render(scene, DEFAULT)
    first[:] = 0
    assert (render(scene, DEFAULT) == render(scene, DEFAULT)).all()
    assert render(scene, DEFAULT).any()


def test_too_small_a_side_is_an_error() -> None:
    with pytest.raises(DataError, match="16"):
        render(Scene("white"), DEFAULT, 8)
