"""Image requests: sizes of the model, its context and the limits of a server; seeds."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neounify.config import ModelConfig
from neounify.config.presets import SCENES, TINY, U1_8B, U1_A3B
from neounify.errors import ImageError, RequestError
from neounify.flow.sampling import ImageSampling
from neounify.image import TRAINING_BUCKETS
from neounify.image.pixels import check_image_tokens, image_tokens, output_size
from neounify.tasks.image import ImageRequest, draw_noise


@pytest.mark.parametrize("config", [U1_8B, U1_A3B])
@pytest.mark.parametrize("size", [*TRAINING_BUCKETS, (4096, 4096), (8192, 8192), (10_240, 32)])
def test_published_models_keep_their_sizes(config: ModelConfig, size: tuple[int, int]) -> None:
    assert output_size(config, *size) == size


def test_an_image_beyond_the_context_is_refused() -> None:
    message = (
        "an image of 4096x4096 has 65,536 tokens, this model's context holds 2,048 at most; "
        "the largest of this shape is 720x720"
    )
    with pytest.raises(ImageError, match=re.escape(message)):
        output_size(SCENES, 4096, 4096)
    assert output_size(SCENES, 720, 720) == (720, 720)


def test_the_default_size_is_always_allowed() -> None:
    small = TINY.replace(max_positions=3)
    assert output_size(small, None, None) == output_size(small, 128, 128) == (128, 128)
    with pytest.raises(ImageError, match="16 at most"):
        output_size(small, 160, 128)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 3000))
def test_the_size_that_is_named_is_allowed(columns: int, rows: int, limit: int) -> None:
    side = SCENES.token_size
    limit = min(limit, SCENES.max_positions)
    try:
        check_image_tokens(SCENES, columns * side, rows * side, limit)
    except ImageError as error:
        match = re.search(r"the largest of this shape is (\d+)x(\d+)", str(error))
        assert match is not None
        width, height = map(int, match.groups())
        assert columns * rows > limit
        assert width % side == height % side == 0
        assert width <= columns * side
        assert height <= rows * side
        assert 0 < image_tokens(SCENES, width, height) <= limit
    else:
        assert columns * rows <= limit


def test_images_with_seeds_begin_as_each_does_alone() -> None:
    sampling = ImageSampling().resolve(TINY, editing=False)

    def noise(**seeds: object) -> torch.Tensor:
        request = ImageRequest(
            prompt="a boat",
            width=64,
            height=32,
            sampling=sampling,
            **seeds,  # type: ignore[arg-type]
        )
        return request.start(TINY)

    together = noise(seeds=(5, 2**64 - 1), count=2)
    assert torch.equal(together, torch.cat([noise(seed=5), noise(seed=2**64 - 1)]))
    assert not torch.equal(together, noise(seed=5, count=2))
    with pytest.raises(RequestError, match="2 seeds for 3 images"):
        noise(seeds=(5, 6), count=3)
    with pytest.raises(RequestError, match="below 2\\^64"):
        noise(seeds=(5, 2**64), count=2)


def test_noise_drawn_as_tokens_is_the_generators_as_it_comes() -> None:
    flow = dataclasses.replace(TINY.flow, noise_draw="tokens", noise_scale_mode="fixed")
    config = TINY.replace(flow=flow)
    side = config.token_size
    values = 6 * config.token_width
    drawn = draw_noise(config, 2 * side, 3 * side, torch.Generator().manual_seed(5), 2)
    plain = torch.randn(2 * values, generator=torch.Generator().manual_seed(5))
    assert drawn.shape == (2, 6, config.token_width)
    assert torch.equal(drawn.flatten(), plain * flow.noise_scale)
    images = draw_noise(TINY, 2 * side, 3 * side, torch.Generator().manual_seed(5))
    assert not torch.equal(images[0], drawn[0])
