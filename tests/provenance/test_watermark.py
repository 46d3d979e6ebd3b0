"""The invisible mark: found where it is, not found where it is not, and not seen."""

from __future__ import annotations

import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from neounify.errors import ImageError
from neounify.provenance.watermark import (
    FIELDS,
    MAX_NUMBER,
    MIN_AGREEING,
    Marker,
    MarkError,
    read_fields,
    write_fields,
)
from neounify.scenes.world import render, sample_rng, sample_scene, scene_config

# Its own library wants libGL.so.1, which a bare machine may lack.
pytest.importorskip("imwatermark", exc_type=ImportError)

PRESET = scene_config("default")


def scene(number: int, side: int) -> Image.Image:
    return Image.fromarray(render(sample_scene(sample_rng(number), PRESET), PRESET, side))


def jpeg(image: Image.Image) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return Image.open(BytesIO(buffer.getvalue()))


def test_wrong_fields_do_not_matter_until_too_many_are() -> None:
    rng = np.random.default_rng(0)
    for number in range(MAX_NUMBER + 1):
        for wrong in (0, 40, 100):
            fields = write_fields(number).copy()
            fields[rng.permutation(FIELDS)[:wrong]] ^= 1
            assert read_fields(fields) == (number if wrong <= FIELDS - MIN_AGREEING else None)


def test_marks_are_far_from_each_other_and_from_regular_images() -> None:
    marks = np.stack([write_fields(number) for number in range(MAX_NUMBER + 1)])
    distances = np.count_nonzero(marks[:, None] != marks[None], axis=-1)
    assert distances[distances > 0].min() == 5 * FIELDS // 32
    rows, columns = np.divmod(np.arange(FIELDS), 16)
    for pattern in (rows * 0, rows * 0 + 1, rows % 2, columns % 2, (rows + columns) % 2, rows < 8):
        assert read_fields(pattern.astype(np.uint8)) is None


@pytest.mark.parametrize("number", [-1, 256])
def test_numbers_out_of_range(number: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 255"):
        Marker(number)


@pytest.mark.parametrize("side", [64, 128, 512])
def test_marks_survive_jpeg(side: int) -> None:
    marker = Marker(17)
    for number in range(6):
        before = scene(number, side)
        marked = marker.mark(before)
        assert marked.size == before.size
        assert Marker().read(marked) == "neounify:17"
        assert marker.read(jpeg(marked)) == "neounify:17"
        error = np.asarray(marked, dtype=float) - np.asarray(before, dtype=float)
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 37


def test_marks_survive_half_the_size_and_another_shape() -> None:
    marker = Marker()
    for number in range(4):
        marked = marker.mark(scene(number, 256))
        assert marker.read(marked.resize((128, 128))) == "neounify:1"
        assert marker.read(marked.resize((300, 200))) == "neounify:1"


def test_odd_shapes_and_modes() -> None:
    marker = Marker()
    for mode in ("L", "RGB", "RGBA"):
        image = scene(1, 200).crop((0, 0, 199, 65)).convert(mode)
        assert marker.read(marker.mark(image)) == "neounify:1"


@pytest.mark.parametrize("colour", ["black", "white", "grey", "red", "lime", "blue", "yellow"])
def test_one_plain_colour(colour: str) -> None:
    marked = Marker().mark(Image.new("RGB", (64, 64), colour))
    assert Marker().read(jpeg(marked)) == "neounify:1"


def test_unmarked_images_have_no_mark() -> None:
    marker = Marker()
    rng = np.random.default_rng(0)
    for number in range(40):
        assert marker.read(scene(number, 64)) is None
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        assert marker.read(Image.fromarray(noise)) is None


def test_a_second_mark_replaces_the_first() -> None:
    assert Marker(3).read(Marker(3).mark(Marker(2).mark(scene(0, 128)))) == "neounify:3"


def test_images_too_small_for_a_mark() -> None:
    with pytest.raises(ImageError, match="80x63 is too small for an invisible mark"):
        Marker().mark(Image.new("RGB", (80, 63)))
    assert Marker().read(Image.new("RGB", (5, 3))) is None


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    with pytest.raises(MarkError, match=r"pip install .* '\.\[watermark\]'"):
        Marker()
