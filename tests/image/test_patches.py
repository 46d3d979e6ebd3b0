"""Tokens: the order inside, inversion, and the recorded layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neounify.image import patchify, unpatchify
from support.golden import load_fixture, needs_golden

sides = st.integers(1, 4)


@given(sides, sides, sides, sides)
def test_unpatchify_inverts(batch: int, h: int, w: int, size: int) -> None:
    images = torch.randn(batch, 3, h * size, w * size)
    assert torch.equal(unpatchify(patchify(images, size, 3), h, w, size, 3), images)


def test_order_inside() -> None:
    images = torch.zeros(1, 3, 4, 6)
    images[0, 1, 3, 2] = 7  # channel 1; square (1, 1) of side 2, row 1, column 0 inside
    assert patchify(images, 2, 3)[0, 1 * 3 + 1].nonzero().item() == (1 * 2 + 0) * 3 + 1


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 3, 5, 4), 2, "sides 5 and 4 must be multiples of the size 2"),
        ((1, 3, 4, 4), 0, "multiples of the size 0"),
        ((1, 4, 4, 4), 2, r"got \(1, 4, 4, 4\)"),
        ((3, 4, 4), 2, r"got \(3, 4, 4\)"),
    ],
)
def test_wrong_images(shape: tuple[int, ...], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patchify(torch.zeros(shape), size, 3)


@pytest.mark.parametrize("shape", [(1, 5, 12), (1, 6, 13), (6, 12)])
def test_wrong_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needs \[batch, 6, 12\], got \("):
        unpatchify(torch.zeros(shape), 2, 3, 2, 3)


@needs_golden
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-pixelhead"])
def test_the_recorded_layout(name: str) -> None:
    arrays = load_fixture(name, "vision")[0]
    image = arrays["image"]
    assert torch.equal(patchify(image, 32, 3), arrays["image.z"])
    assert torch.equal(unpatchify(arrays["image.z"], 3, 2, 32, 3), image)
