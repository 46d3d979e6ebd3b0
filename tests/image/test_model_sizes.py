"""Sizes a model was trained at, and the warning about others."""

from __future__ import annotations

import warnings

import pytest

import neounify
from neounify.bundled import bundled_model
from neounify.config import CheckpointDefaults
from neounify.config.presets import SCENES, TINY, U1_8B
from neounify.errors import SizeWarning
from neounify.image.pixels import size_advice
from neounify.pipeline import Pipeline


@pytest.fixture(scope="module")
def bundled() -> Pipeline:
    return neounify.load(bundled_model(), device="cpu")


def test_the_bundled_model_records_its_sizes(bundled: Pipeline) -> None:
    sizes = bundled.config.sampling.trained_sizes
    assert {(64, 64), (96, 96), (128, 64)} <= set(sizes)
    assert all(size_advice(bundled.config, *size) is None for size in sizes)


@pytest.mark.parametrize("size", [(160, 160), (160, 64), (96, 128)])
def test_every_call_warns_of_other_sizes_and_names_the_trained_ones(
    bundled: Pipeline, size: tuple[int, int]
) -> None:
    width, height = size
    words = f"size {width}x{height}: the model was trained at 64x64, 96x96"
    with pytest.warns(SizeWarning, match=words) as caught:
        image = bundled.generate("a star", width=width, height=height, steps=1).images[0]
    assert caught[0].filename == __file__
    with pytest.warns(SizeWarning, match=words):
        bundled.edit("Turn it red.", image, width=width, height=height, steps=1)
    with pytest.warns(SizeWarning, match=words):
        list(bundled.interleave("A story.", width=width, height=height, max_images=0))


def test_a_shape_taken_from_an_input_image_is_warned_of(bundled: Pipeline) -> None:
    wide = bundled.generate("a star", steps=1).images[0].resize((160, 64))
    with pytest.warns(SizeWarning, match="size 96x32"):
        bundled.edit("Turn it red.", wide, steps=1)


def test_the_trained_sizes_are_silent(bundled: Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for width, height in bundled.config.sampling.trained_sizes:
            bundled.generate("a star", width=width, height=height, steps=1)


@pytest.mark.parametrize(
    ("size", "fine"),
    [((2048, 2048), True), ((1152, 3456), True), ((1024, 768), True), ((256, 256), False)],
)
def test_published_models_without_the_field(size: tuple[int, int], fine: bool) -> None:
    assert not U1_8B.sampling.trained_sizes
    advice = size_advice(U1_8B, *size)
    assert (advice is None) == fine
    if advice:
        assert "areas from 512x512 to 2048x2048 pixels" in advice
        assert "2720x1536" in advice


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert size_advice(TINY, 32, 4096) is None


def test_a_range_of_areas_and_pairs_beside_it() -> None:
    sampling = CheckpointDefaults(
        image_size=(64, 64), trained_sizes=((256, 32),), trained_pixels=(64**2, 128**2)
    )
    config = SCENES.replace(sampling=sampling)
    assert size_advice(config, 256, 32) is None
    assert size_advice(config, 96, 64) is None
    assert "areas from 64x64 to 128x128 pixels, as 256x32" in str(size_advice(config, 256, 256))
