"""Editing: which prefixes, which sizes, which intervals."""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import neounify
from neounify.errors import ImageError, PromptError, RequestError
from neounify.tasks.image import edit_images
from support.prefilling import watch_prefills

FEW: dict[str, Any] = {"steps": 3, "seed": 1}


def example_image(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("guidance", "image_guidance", "prefixes"),
    [(1.0, 1.0, 1), (4.0, 1.0, 2), (4.0, 4.0, 2), (4.0, 2.0, 3), (1.0, 2.0, 3)],
)
def test_only_the_prefixes_that_are_needed(
    pipe: neounify.Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    guidance: float,
    image_guidance: float,
    prefixes: int,
) -> None:
    calls = watch_prefills(monkeypatch)
    pipe.edit(
        "redder", example_image(64, 64), guidance=guidance, image_guidance=image_guidance, **FEW
    )
    assert [len(prompts) for prompts in calls] == [prefixes]


def test_size_follows_the_first_image(pipe: neounify.Pipeline) -> None:
    out = pipe.edit("redder", [example_image(200, 100), example_image(50, 90)], **FEW)
    assert out.images[0].size == (160, 64)
    out = pipe.edit("redder", example_image(200, 100), width=32, height=64, **FEW)
    assert out.images[0].size == (32, 64)


@pytest.mark.parametrize("text", ["", "  ", "<image>"])
def test_an_empty_instruction_is_refused_as_an_empty_prompt_is(
    pipe: neounify.Pipeline, text: str
) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        pipe.edit(text, example_image(64, 64), **FEW)
    with pytest.raises(PromptError, match="the prompt is empty"):
        pipe.generate(text.replace("<image>", ""), width=64, height=64, **FEW)


def test_images_and_their_order_matter(pipe: neounify.Pipeline) -> None:
    a, b = example_image(64, 64, 1), example_image(64, 64, 2)
    ab = pipe.edit("mix <image> and <image>", [a, b], **FEW).pixels
    ba = pipe.edit("mix <image> and <image>", [b, a], **FEW).pixels
    assert not torch.allclose(ab, ba, atol=1e-5)


def test_interval_from_zero_ends_unless_the_published_behaviour_is_asked_for(
    pipe: neounify.Pipeline,
) -> None:
    image = example_image(64, 64)
    always = pipe.edit("redder", image, **FEW).pixels
    short = pipe.edit("redder", image, guidance_interval=(0.0, 0.1), **FEW).pixels
    published = pipe.edit(
        "redder", image, guidance_interval=(0.0, 0.1), published_interval=True, **FEW
    ).pixels
    assert torch.equal(published, always)
    assert not torch.allclose(short, always, atol=1e-4)


def test_several_images_and_thinking(pipe: neounify.Pipeline) -> None:
    out = pipe.edit(
        "redder", example_image(64, 64), images_per_prompt=2, think=True, max_think_tokens=3, **FEW
    )
    assert out.pixels.shape[0] == 2
    assert isinstance(out.thoughts[0], str)


def test_bad_input(pipe: neounify.Pipeline) -> None:
    with pytest.raises(RequestError, match="at least one image"):
        pipe.edit("redder", [], **FEW)
    with pytest.raises(PromptError, match="2"):
        pipe.edit("<image> and <image>", example_image(64, 64), **FEW)
    with pytest.raises(ImageError):
        pipe.edit("redder", b"not an image", **FEW)
    with pytest.raises(ImageError, match="200"):
        pipe.edit("redder", example_image(3000, 10), **FEW)
    with pytest.raises(RequestError, match="cfg_zero_star"):
        pipe.edit("redder", example_image(64, 64), guidance_norm="cfg_zero_star", **FEW)
    with pytest.raises(RequestError, match=r"noise must be \[.*, 3, H, W\] for 1 prompts"):
        pipe.edit("redder", example_image(64, 64), noise=torch.zeros(1, 4, 64, 64), **FEW)
    with pytest.raises(RequestError, match=r"noise must be .* got \(4,\)"):
        pipe.edit("redder", example_image(64, 64), noise=torch.zeros(4), **FEW)


@pytest.mark.parametrize("name", ["temperature", "stpes"])
def test_names_that_are_no_arguments(pipe: neounify.Pipeline, name: str) -> None:
    with pytest.raises(TypeError, match=rf"edit\(\) got an unexpected keyword argument '{name}'"):
        pipe.edit("redder", b"not an image", **{name: 1})  # type: ignore[arg-type]


def test_more_images_than_the_total_area_has_room_for(pipe: neounify.Pipeline) -> None:
    """Each becomes smaller than the minimum of one image, so that all of them keep the total."""
    sampling = pipe.config.sampling
    count = sampling.edit_max_total_pixels // sampling.edit_min_pixels + 1
    images = [example_image(64, 64, seed) for seed in range(count)]
    prepared = edit_images(pipe.processor, images)
    sizes = [image.shape[1] * image.shape[2] for image in prepared]
    assert sum(sizes) <= sampling.edit_max_total_pixels
    out = pipe.edit("redder", images, width=64, height=64, **FEW)
    assert out.images[0].size == (64, 64)
