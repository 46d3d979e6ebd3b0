"""The resize rule, the training buckets, and the legal sizes of generated images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neounify.errors import ImageError
from neounify.image import TRAINING_BUCKETS, check_size, fit_size, nearest_legal_sizes
from support.golden import GOLDEN, load_fixture, needs_golden

GIANT = 10**6000
BAD_NUMBERS = [0, -5, 10**20, GIANT, -GIANT, 1.5, "64", None, True]
CASES = load_fixture("common", "preprocess")[1]["smart_resize"]["cases"] if GOLDEN else {}


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_fit_size_matches_the_recorded_sizes(case: str) -> None:
    height, width, least, most = map(int, case.split(","))
    size = fit_size(height, width, multiple=32, min_pixels=least, max_pixels=most)
    assert list(size) == CASES[case]


@pytest.mark.parametrize(
    ("height", "width", "least", "most", "expected"),
    [
        (1262, 3984, 256**2, 2048**2, (1152, 3616)),
        (48, 80, 1, 10**6, (64, 64)),
        (1, 1, 1, 10**6, (32, 32)),
        (100, 100, 512**2, 2048**2, (512, 512)),
    ],
)
def test_fit_size(
    height: int, width: int, least: int, most: int, expected: tuple[int, int]
) -> None:
    assert fit_size(height, width, min_pixels=least, max_pixels=most) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([16, 32]))
def test_fit_size_is_legal_and_within_bounds(height: int, width: int, multiple: int) -> None:
    if max(height, width) > 20 * min(height, width):
        height = width
    least, most = 256**2, 2048**2
    h, w = fit_size(height, width, multiple=multiple, min_pixels=least, max_pixels=most)
    assert h % multiple == w % multiple == 0
    assert least <= h * w <= most


def test_fit_size_takes_integers_of_arrays() -> None:
    shape = np.array([64, 96])
    size = fit_size(shape[0], shape[1], min_pixels=1, max_pixels=10**6)
    assert size == (64, 96)
    assert all(type(side) is int for side in size)


@pytest.mark.parametrize(("height", "width"), [(1, 201), (201, 1), (10, 2001)])
def test_too_narrow(height: int, width: int) -> None:
    with pytest.raises(ImageError, match="factor of 200"):
        fit_size(height, width, min_pixels=1, max_pixels=10**6)
    fit_size(1, 200, min_pixels=1, max_pixels=10**6)


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=[str(index) for index in range(len(BAD_NUMBERS))])
def test_fit_size_refuses_what_is_no_size(bad: object) -> None:
    good = {"height": 64, "width": 64, "multiple": 32, "min_pixels": 1, "max_pixels": 10**6}
    for name in good:
        if name == "max_pixels" and bad == 10**20:
            continue
        with pytest.raises(ImageError, match=name):
            fit_size(**{**good, name: bad})  # type: ignore[arg-type]


def test_fit_size_refuses_crossed_bounds() -> None:
    with pytest.raises(ImageError, match="min_pixels 5 is above max_pixels 4"):
        fit_size(64, 64, min_pixels=5, max_pixels=4)


def test_training_buckets_are_legal_and_symmetric() -> None:
    assert len(set(TRAINING_BUCKETS)) == 11
    for width, height in TRAINING_BUCKETS:
        check_size(width, height, 32, 4096)
        assert (height, width) in TRAINING_BUCKETS
        assert 0.94 < width * height / 2048**2 < 1.01


def test_nearest_legal_sizes() -> None:
    assert nearest_legal_sizes(100, 64, 32) == [(96, 64), (128, 64)]
    sizes = nearest_legal_sizes(100, 50, 32)
    assert sizes[0] == (96, 64)
    assert set(sizes) == {(96, 64), (96, 32), (128, 64), (128, 32)}
    assert nearest_legal_sizes(5000, 64, 32, max_side=4100) == [(4096, 64)]


@given(st.integers(), st.integers(), st.integers(1, 64))
def test_nearest_legal_sizes_are_legal(width: int, height: int, multiple: int) -> None:
    sizes = nearest_legal_sizes(width, height, multiple, 4096)
    assert 1 <= len(sizes) <= 4
    for w, h in sizes:
        check_size(w, h, multiple, 4096)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (100, 64, r"size 100x64: .* multiples of 32 from 32 to 4096; nearest: 96x64, 128x64"),
        (0, 64, "nearest: 32x64"),
        (-64, 64, "nearest: 32x64"),
        (8192, 64, "nearest: 4096x64"),
        pytest.param(GIANT, 64, "nearest: 4096x64", id="giant"),
        (64.0, 64, "width must be an integer"),
        (64, "64", "height must be an integer"),
        (64, True, "height must be an integer"),
    ],
)
def test_check_size_names_the_nearest(width: object, height: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        check_size(width, height, 32, 4096)  # type: ignore[arg-type]


def test_no_legal_size_at_all() -> None:
    with pytest.raises(ImageError, match="no side is legal: the least is 32, the greatest 16"):
        check_size(64, 64, 32, 16)
