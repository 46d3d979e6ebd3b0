"""Patches: the order inside, inversion, and the recorded layouts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neounify.image import from_patches, patchify, to_patches, unpatchify
from support.golden import load_fixture, needs_golden

sides = st.integers(1, 4)


@given(sides, sides, sides, sides)
def test_both_layouts_invert(batch: int, h: int, w: int, size: int) -> None:
    images = torch.randn(batch, 3, h * size, w * size)
    assert torch.equal(unpatchify(patchify(images, size), h, w, size), images)
    assert torch.equal(from_patches(to_patches(images, size), h, w, size), images)


def test_order_inside() -> None:
    images = torch.zeros(1, 3, 4, 6)
    images[0, 1, 3, 2] = 7  # channel 1; square (1, 1) of side 2, row 1, column 0 inside
    assert patchify(images, 2)[0, 1 * 3 + 1].nonzero().item() == (1 * 2 + 0) * 3 + 1
    assert to_patches(images, 2)[0, 1 * 3 + 1].nonzero().item() == (1 * 2 + 1) * 2 + 0


@pytest.mark.parametrize("cut", [patchify, to_patches])
@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 3, 5, 4), 2, "sides 5 and 4 must be multiples of the size 2"),
        ((1, 3, 4, 4), 0, "multiples of the size 0"),
        ((1, 4, 4, 4), 2, r"got \(1, 4, 4, 4\)"),
        ((3, 4, 4), 2, r"got \(3, 4, 4\)"),
    ],
)
def test_wrong_images(cut: object, shape: tuple[int, ...], size: int, message: str) -> None:
    assert callable(cut)
    with pytest.raises(ValueError, match=message):
        cut(torch.zeros(shape), size)


@pytest.mark.parametrize("join", [unpatchify, from_patches])
@pytest.mark.parametrize("shape", [(1, 5, 12), (1, 6, 13), (6, 12)])
def test_wrong_squares(join: object, shape: tuple[int, ...]) -> None:
    assert callable(join)
    with pytest.raises(ValueError, match=r"needs \[batch, 6, 12\], got \("):
        join(torch.zeros(shape), 2, 3, 2)


@needs_golden
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-pixelhead"])
def test_recorded_layouts(name: str) -> None:
    arrays = load_fixture(name, "vision")[0]
    image = arrays["image"]
    assert torch.equal(patchify(image, 32), arrays["image.z"])
    assert torch.equal(to_patches(image, 16), arrays["image.patches16"])
    assert torch.equal(unpatchify(arrays["image.z"], 3, 2, 32), image)
    assert torch.equal(from_patches(arrays["image.patches16"], 6, 4, 16), image)
