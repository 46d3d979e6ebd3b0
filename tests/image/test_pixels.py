"""Pixel values: both ranges, the way back to images, and the recorded preprocessing."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neounify.errors import ImageError
from neounify.image import (
    MEAN,
    STD,
    normalise_und,
    prepare_image,
    read_image,
    to_pil,
    to_und_pixels,
)
from support.golden import golden_path, load_fixture, needs_golden
from support.patches import to_gen_pixels, to_patches

BOUNDS: dict[str, Any] = {"multiple": 32, "min_pixels": 256**2, "max_pixels": 2048**2}


def noise_image(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_und_pixels_are_normalised_per_channel() -> None:
    image = noise_image(5, 3)
    pixels = to_und_pixels(image)
    assert pixels.shape == (3, 3, 5)
    assert pixels.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        expected = (np.asarray(image)[:, :, channel] / 255 - mean) / std
        assert np.allclose(pixels[channel].numpy(), expected, atol=1e-6)


def test_pixels_are_rounded_once_at_the_end() -> None:
    image = noise_image(5, 3)
    assert torch.equal(to_und_pixels(image, torch.bfloat16), to_und_pixels(image).bfloat16())


def test_pixels_of_the_generation_stream_come_back_as_an_image() -> None:
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3))
    pixels = to_gen_pixels(image)
    assert to_pil(pixels[None])[0].tobytes() == image.tobytes()


def test_to_pil_clamps_and_rounds() -> None:
    values = torch.tensor([-3.0, -1.0, 2 * 99.4 / 255 - 1, 2 * 99.6 / 255 - 1, 3.0])
    pixels = values.reshape(1, 1, 1, 5).expand(2, 3, 1, 5)
    images = to_pil(pixels)
    assert len(images) == 2
    assert np.asarray(images[1])[0, :, 2].tolist() == [0, 0, 99, 100, 255]
    assert to_pil(pixels.bfloat16())[0].size == (5, 1)
    assert to_pil(torch.zeros(1, 3, 2, 2, requires_grad=True))[0].mode == "RGB"


def test_normalise_und_keeps_dtype_and_does_not_clamp() -> None:
    x = torch.full((2, 3, 4, 4), 1.5)
    y = normalise_und(x)
    assert torch.allclose(y[:, 0], torch.tensor((1.5 - 0.485) / 0.229))
    assert normalise_und(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(normalise_und(x[0]), y[0])


@pytest.mark.parametrize("shape", [(3,), (4, 4, 3), (1, 4, 5, 5)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got \(" + ", ".join(map(str, shape))):
        normalise_und(torch.zeros(shape))
    with pytest.raises(ValueError, match="batch, 3, height, width"):
        to_pil(torch.zeros(shape))


def test_only_rgb_images() -> None:
    with pytest.raises(ValueError, match="must be RGB, not L"):
        to_und_pixels(Image.new("L", (4, 4)))


def test_prepare_image_resizes_by_the_rule() -> None:
    prepared = prepare_image(noise_image(100, 70), **BOUNDS, dtype=torch.bfloat16)
    assert prepared.shape == (3, 224, 320)
    assert prepared.dtype == torch.bfloat16
    with pytest.raises(ImageError, match="too narrow"):
        prepare_image(noise_image(1, 300), **BOUNDS)


def test_prepare_image_leaves_a_legal_size_alone() -> None:
    image = noise_image(320, 224)
    assert torch.equal(prepare_image(image, **BOUNDS), to_und_pixels(image))


@needs_golden
@pytest.mark.parametrize("name", ["d_rgba_100x70", "e_rgb_333x200", "f_gray_90x300"])
def test_prepared_images_match_the_recorded(name: str) -> None:
    arrays = load_fixture("common", "preprocess")[0]
    image = prepare_image(read_image(golden_path("fixtures", "images", f"{name}.png")), **BOUNDS)
    patches = to_patches(image[None], 16)[0]
    assert [image.shape[1] // 16, image.shape[2] // 16] == arrays[f"{name}.grid_hw"][0].tolist()
    assert torch.allclose(patches, arrays[f"{name}.pixel_values"], rtol=0, atol=1e-6)


@needs_golden
@pytest.mark.parametrize("name", ["a_512x512", "b_672x416", "c_320x224"])
def test_large_prepared_images_match_the_recorded(name: str) -> None:
    arrays = load_fixture("common", "preprocess")[0]
    image = prepare_image(read_image(golden_path("fixtures", "images", f"{name}.png")), **BOUNDS)
    patches = to_patches(image[None], 16)[0]
    assert torch.allclose(patches[:4], arrays[f"{name}.first4"], rtol=0, atol=1e-6)
    assert torch.allclose(patches[-4:], arrays[f"{name}.last4"], rtol=0, atol=1e-6)
    assert torch.allclose(patches.mean(1), arrays[f"{name}.patch_mean"], rtol=0, atol=1e-5)
