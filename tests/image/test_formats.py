"""AVIF and HEIC: read where there is a decoder, named where there is none."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image, features

from image.test_io import file_bytes
from neounify.errors import ImageError
from neounify.image import read_image
from neounify.image.formats import isobmff_format
from support.colour_profiles import DISPLAY_P3, rgb_profile

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
COLOUR, P3_AS_SRGB = (200, 100, 50), (213, 94, 33)


def heic(**options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    image = pillow_heif.from_pillow(Image.new("RGB", (64, 32), COLOUR))
    image.save(file, quality=100, **options)
    return file.getvalue()


@needs_avif
@pytest.mark.parametrize(("profile", "wanted"), [(None, COLOUR), (DISPLAY_P3, P3_AS_SRGB)])
def test_avif(profile: tuple[tuple[float, ...], ...] | None, wanted: tuple[int, ...]) -> None:
    options = {} if profile is None else {"icc_profile": rgb_profile(profile)}
    data = file_bytes(Image.new("RGB", (64, 32), COLOUR), "AVIF", quality=100, **options)
    assert isobmff_format(data) == "AVIF"
    read = np.asarray(read_image(data)).astype(int)
    assert read.shape == (32, 64, 3)
    assert np.abs(read - wanted).max() <= 4
    with pytest.raises(ImageError, match="at most 100 are decoded"):
        read_image(data, max_pixels=100)
    for length in (20, len(data) // 2):
        with pytest.raises(ImageError):
            read_image(data[:length])


def test_heic() -> None:
    data = heic()
    assert isobmff_format(data) == "HEIC"
    assert np.abs(np.asarray(read_image(data)).astype(int) - COLOUR).max() <= 4
    assert "HEIF" not in Image.OPEN, "the decoder is ours alone, not every Image.open's"
    with pytest.raises(ImageError, match="at most 100 are decoded"):
        read_image(data, max_pixels=100)
    for length in (20, len(data) // 2):
        with pytest.raises(ImageError):
            read_image(data[:length])


def test_without_decoders_the_message_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"\0\0\0\x1cftyp%b\0\0\0\0mif1%bmiaf" + b"\0" * 40
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"a HEIC file, which needs a decoder: .*pillow-heif"):
        read_image(head % (b"heic", b"heic"))
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ImageError, match="an AVIF file, which this Pillow cannot decode"):
        read_image(head % (b"mif1", b"avif"))


@pytest.mark.parametrize("data", [b"\0\0\0\x18ftypisom\0\0\0\0isommp42", b"\xff\xff\xff\xffftyp"])
def test_other_containers_are_no_images(data: bytes) -> None:
    assert isobmff_format(data) is None
    with pytest.raises(ImageError, match="not an image"):
        read_image(data)
