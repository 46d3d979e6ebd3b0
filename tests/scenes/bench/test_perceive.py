"""Seeing: what was rendered is recovered, also when worn; what is no shape is not named."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from neounify.data.sample import DataError
from neounify.scenes.bench import Percept, perceive
from neounify.scenes.bench.perceive import label_components
from neounify.scenes.bench.validation import WEARS, wear_out
from neounify.scenes.world import (
    PRESETS,
    SHAPES,
    Scene,
    SceneObject,
    render,
    sample_rng,
    sample_scene,
)
from support import slow_perceive

DEFAULT, HARD = PRESETS["wide"], PRESETS["hard"]


def agrees(scene: Scene, seen: Percept) -> bool:
    """Whether everything about a scene was seen."""
    truth = [(o.shape, o.colour, o.size, o.cell) for o in scene.objects]
    return seen.background == scene.background and truth == [
        (o.shape, o.colour, o.size, o.cell) for o in seen.objects
    ]


def flood_fill(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The slow, plain labelling."""
    labels = np.zeros(mask.shape, int)
    count = 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        todo = [start]
        while todo:
            y, x = todo.pop()
            inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
            if inside and mask[y, x] and not labels[y, x]:
                labels[y, x] = count
                todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return labels, count


def test_components_are_those_of_a_flood_fill() -> None:
    rng = np.random.default_rng(0)
    for density in (0.1, 0.3, 0.5, 0.9):
        for shape in ((1, 7), (9, 1), (16, 16), (23, 40)):
            mask = rng.random(shape) < density
            labels, count = label_components(mask)
            expected, expected_count = flood_fill(mask)
            assert count == expected_count
            assert (labels == expected).all()


def test_no_component_and_one() -> None:
    assert label_components(np.zeros((4, 4), bool))[1] == 0
    labels, count = label_components(np.ones((4, 4), bool))
    assert count == 1
    assert (labels == 1).all()


def test_a_spiral_is_one_component() -> None:
    mask = np.zeros((7, 7), bool)
    for stroke in (np.s_[0], np.s_[:, 6], np.s_[6], np.s_[2:, 0], np.s_[2, :5], np.s_[2:5, 4]):
        mask[stroke] = True
    assert label_components(mask)[1] == 1


@pytest.mark.parametrize("name", PRESETS)
def test_true_renders_are_seen(name: str) -> None:
    config = PRESETS[name]
    for index in range(120):
        scene = sample_scene(sample_rng(21, index), config, split="any")
        assert agrees(scene, perceive(render(scene, config), config)), scene


@pytest.mark.parametrize("side", [96, 128, 256])
def test_larger_images_are_seen_too(side: int) -> None:
    for index in range(20):
        scene = sample_scene(sample_rng(22, index), HARD, split="any")
        assert agrees(scene, perceive(Image.fromarray(render(scene, HARD, side)), HARD))


def test_places_are_measured() -> None:
    scene = Scene("white", (SceneObject("triangle", "blue", "large", (2, 0), (1.0, -1.0)),))
    x, y = HARD.centre(scene.objects[0])
    (seen,) = perceive(render(scene, HARD), HARD).objects
    assert [seen.x, seen.y] == pytest.approx([x, y], abs=0.01)
    assert seen.radius == pytest.approx(HARD.radius("large"), rel=0.06)
    assert seen.place == "bottom left"


def test_an_empty_image_has_no_objects() -> None:
    seen = perceive(render(Scene("grey"), DEFAULT), DEFAULT)
    assert (seen.background, seen.objects, seen.clutter) == ("grey", (), 0.0)


def test_a_background_off_every_name_has_none() -> None:
    green = np.full((64, 64, 3), (90, 20, 90), np.uint8)
    assert perceive(green, DEFAULT).background is None


def test_pure_noise_is_no_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not any(o.shape and o.colour and o.size for o in perceive(noise, DEFAULT).objects)


def test_specks_are_clutter_not_objects() -> None:
    image = render(Scene("white"), DEFAULT)
    image[30:33, 30:33] = (255, 0, 0)
    seen = perceive(image, DEFAULT)
    assert not seen.objects
    assert 0 < seen.clutter < 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("stretch", "known"), [(1.12, True), (1.7, False)])
def test_stretched_shapes_are_known_up_to_a_point(shape: str, stretch: float, known: bool) -> None:
    scene = Scene("white", (SceneObject(shape, "red", "large", (1, 1)),))
    wide = Image.fromarray(render(scene, DEFAULT, 256)).resize((round(256 * stretch), 256))
    left = (wide.width - 256) // 2
    image = wide.crop((left, 0, left + 256, 256)).resize((64, 64), Image.Resampling.BOX)
    (seen,) = perceive(image, DEFAULT).objects
    assert (seen.shape == shape) == known


@pytest.mark.parametrize(
    ("radius_share", "size"),
    [(0.40, "small"), (0.45, "small"), (0.58, "small"), (0.67, "large"), (0.76, "large")],
)
def test_a_size_goes_to_the_nearer_class(radius_share: float, size: str) -> None:
    drawn = replace(DEFAULT, sizes=("small",), small=radius_share, large=0.785)
    scene = Scene("white", (SceneObject("circle", "red", "small", (0, 0)),))
    (seen,) = perceive(render(scene, drawn), DEFAULT).objects
    assert seen.size == size


def test_far_too_small_is_no_size() -> None:
    drawn = replace(DEFAULT, sizes=("small",), small=0.32)
    scene = Scene("white", (SceneObject("circle", "red", "small", (0, 0)),))
    (seen,) = perceive(render(scene, drawn), DEFAULT).objects
    assert seen.size is None


def test_images_of_the_wrong_kind_are_errors() -> None:
    with pytest.raises(DataError, match="square"):
        perceive(np.zeros((64, 32, 3), np.uint8), DEFAULT)
    with pytest.raises(DataError, match="uint8"):
        perceive(np.zeros((64, 64, 3), np.float32), DEFAULT)


@pytest.mark.parametrize("world", sorted(PRESETS))
@pytest.mark.parametrize("size", [(64, 64), (96, 96), (128, 64)])
def test_batched_candidates_give_the_percepts_of_one_at_a_time(
    world: str, size: tuple[int, int]
) -> None:
    config = PRESETS[world].sized(*size)
    for n in range(15):
        rng = sample_rng(31, 1, n)
        image = render(sample_scene(rng, config, split="any"), config)
        noisy = rng.integers(0, 256, image.shape, dtype=np.uint8)
        images = [image, noisy, *(wear_out(image, wear, rng) for wear in WEARS)]
        mixed = np.where(rng.random((*image.shape[:2], 1)) < 0.1, noisy, image)
        for seen in (*images, mixed.astype(np.uint8)):
            assert perceive(seen, config) == slow_perceive.perceive(seen, config)
