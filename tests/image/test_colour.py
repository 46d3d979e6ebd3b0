"""Colour profiles: applied as ICC says, ignored when they cannot be, harmless when hostile."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from neounify.image import read_image
from neounify.image.formats import MAX_PROFILE_BYTES
from support.colour_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    SRGB_CURVE,
    chained_profile,
    cmyk_profile,
    grey_profile,
    rgb_profile,
)

P3 = rgb_profile(DISPLAY_P3)
ADOBE = rgb_profile(ADOBE_RGB, (563 / 256, 1, 0, 1, 0))
LINEAR_GREY = grey_profile(1.0)
COLOURS = [(200, 100, 50), (40, 160, 90), (0, 0, 0), (255, 255, 255), (120, 120, 120)]


def file_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_hand(colour: tuple[int, int, int], primaries: Any, gamma: float | None) -> np.ndarray:
    """sRGB levels of a colour of another RGB space, in float64 from the definitions."""
    level = np.array(colour) / 255
    linear = level**gamma if gamma else _srgb_to_linear(level)
    rgb = np.linalg.solve(np.array(SRGB).T, np.array(primaries).T @ linear).clip(0, 1)
    return 255 * np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)


def _srgb_to_linear(level: np.ndarray) -> np.ndarray:
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("profile", "primaries", "gamma"),
    [(P3, DISPLAY_P3, None), (ADOBE, ADOBE_RGB, 563 / 256)],
)
def test_wide_gamuts_keep_their_colours(
    colour: tuple[int, int, int], kind: str, profile: bytes, primaries: Any, gamma: float | None
) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100}
    data = file_bytes(Image.new("RGB", (8, 8), colour), kind, icc_profile=profile, **options)
    read = np.asarray(read_image(data))
    assert np.abs(read - by_hand(colour, primaries, gamma)).max() <= 2.5
    plain = np.asarray(read_image(data, colour_profiles=False))
    assert np.abs(plain - np.array(colour)).max() <= 2
    if len(set(colour)) > 1:
        assert np.abs(read.astype(int) - plain).max() > 8


def test_a_pil_image_carries_its_profile() -> None:
    image = Image.new("RGB", (2, 2), COLOURS[0])
    image.info["icc_profile"] = P3
    read = read_image(image)
    assert np.abs(np.asarray(read) - by_hand(COLOURS[0], DISPLAY_P3, None)).max() <= 2
    assert not read.info
    assert np.array_equal(np.asarray(read_image(read)), np.asarray(read))


@pytest.mark.parametrize("mode", ["RGBA", "P", "PA"])
def test_transparency_is_laid_on_white_after_the_conversion(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (*COLOURS[0], 255))
    image.putpixel((1, 0), (*COLOURS[0], 0))
    if mode == "PA":
        palette = Image.new("P", (2, 1))
        palette.putpalette(COLOURS[0])
        image = Image.new("PA", (2, 1))
        image.putpalette(COLOURS[0])
        image.putpixel((0, 0), (0, 255))
        image.putpixel((1, 0), (0, 0))
    elif mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([*COLOURS[0], 1, 2, 3])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 1
    image.info["icc_profile"] = P3
    opaque, empty = np.asarray(read_image(image))[0]
    assert np.abs(opaque - by_hand(COLOURS[0], DISPLAY_P3, None)).max() <= 2
    assert empty.tolist() == [255, 255, 255]


def test_a_transparent_colour_is_found_before_the_conversion() -> None:
    image = Image.new("RGB", (2, 1), COLOURS[0])
    image.putpixel((1, 0), (9, 200, 9))
    data = file_bytes(image, icc_profile=P3, transparency=(9, 200, 9))
    opaque, empty = np.asarray(read_image(data))[0]
    assert np.abs(opaque - by_hand(COLOURS[0], DISPLAY_P3, None)).max() <= 2
    assert empty.tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(mode: str) -> None:
    level = 0.2
    values = {
        "L": round(level * 255),
        "LA": (round(level * 255), 255),
        "I;16": round(level * 65535),
    }
    image = Image.new(mode, (3, 3), values[mode])  # type: ignore[arg-type]
    read = np.asarray(read_image(file_bytes(image, icc_profile=LINEAR_GREY)))
    assert np.abs(read - 255 * (1.055 * level ** (1 / 2.4) - 0.055)).max() <= 2
    assert np.ptp(read, axis=-1).max() == 0


def test_greys_with_an_rgb_profile() -> None:
    curve = (1.0, 1, 0, 1, 0)
    image = Image.new("L", (3, 3), 51)
    read = np.asarray(read_image(file_bytes(image, icc_profile=rgb_profile(SRGB, curve))))
    assert np.abs(read.astype(int) - 124).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_with_a_profile(kind: str) -> None:
    # A press whose full cyan is a green: what no formula without the profile could say.
    lab = [(100.0, 0.0, 0.0) if n == 0 else (60.0, -50.0, 40.0) for n in range(16)]
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    for inks, expected in [((255, 0, 0, 0), (60, -50, 40)), ((0, 0, 0, 0), (100, 0, 0))]:
        image = Image.new("CMYK", (16, 16), inks)
        data = file_bytes(image, kind, icc_profile=cmyk_profile(lab), **options)
        read = np.asarray(read_image(data))[8, 8]
        assert np.abs(read - _lab_to_srgb(expected)).max() <= 6
    ignored = read_image(data, colour_profiles=False).getpixel((8, 8))
    assert ignored == (255, 255, 255)


def _lab_to_srgb(lab: tuple[float, ...]) -> np.ndarray:
    l, a, b = lab  # noqa: E741
    f = np.array([(l + 16) / 116 + a / 500, (l + 16) / 116, (l + 16) / 116 - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1.0, 0.8249)
    rgb = np.linalg.solve(np.array(SRGB).T, xyz).clip(0, 1)
    return 255 * np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)


def test_an_srgb_profile_changes_no_bit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = file_bytes(Image.fromarray(noise), icc_profile=rgb_profile(SRGB, SRGB_CURVE))
    assert np.array_equal(np.asarray(read_image(data)), noise)


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", grey_profile(1.0)),
        ("RGB", cmyk_profile([(50.0, 0.0, 0.0)] * 16)),
        ("CMYK", P3),
        ("L", cmyk_profile([(50.0, 0.0, 0.0)] * 16)),
        ("F", P3),
        ("LAB", P3),
        ("RGB", b""),
        ("RGB", b"no profile"),
        ("RGB", P3[:200]),
        ("RGB", P3.replace(b"acsp", b"abcd")),
        ("RGB", chained_profile(300_000)),
        ("RGB", rgb_profile(DISPLAY_P3, padding=MAX_PROFILE_BYTES)),
    ],
)
def test_profiles_that_cannot_be_used_are_ignored(mode: str, profile: bytes) -> None:
    image = Image.new(mode, (4, 4), 100 if mode in ("L", "F") else None)
    plain = np.asarray(read_image(image))
    image.info["icc_profile"] = profile
    assert np.array_equal(np.asarray(read_image(image)), plain)


@pytest.mark.parametrize("padding", [2 * 2**20, 2 * MAX_PROFILE_BYTES])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_large_profiles_never_decide(kind: str, padding: int) -> None:
    profile = rgb_profile(DISPLAY_P3, padding=padding)
    data = file_bytes(Image.new("RGB", (8, 8), COLOURS[0]), kind, icc_profile=profile, quality=100)
    used = padding < MAX_PROFILE_BYTES
    wanted = by_hand(COLOURS[0], DISPLAY_P3, None) if used else np.array(COLOURS[0])
    assert np.abs(np.asarray(read_image(data)) - wanted).max() <= 3


def test_a_profile_that_is_not_a_zlib_stream() -> None:
    data = file_bytes(Image.new("RGB", (4, 4), COLOURS[0]), icc_profile=P3)
    packed = zlib.compress(P3)
    assert packed in data
    for damaged in (b"\0" * len(packed), packed[:-9] + b"\0" * 9):
        broken = data.replace(packed, damaged)
        assert read_image(broken).getpixel((0, 0)) == COLOURS[0]


@given(
    profile=st.sampled_from([P3, grey_profile(1.8), cmyk_profile([(50.0, 9.0, 9.0)] * 16)]),
    edits=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=12),
    mode=st.sampled_from(["RGB", "RGBA", "L", "CMYK"]),
)
def test_hostile_profiles_are_harmless(
    profile: bytes, edits: list[tuple[int, int]], mode: str
) -> None:
    changed = bytearray(profile)
    for offset, value in edits:
        changed[offset % len(changed)] = value
    image = Image.new(mode, (4, 4))
    image.info["icc_profile"] = bytes(changed)
    read = read_image(image)
    assert (read.mode, read.size) == ("RGB", (4, 4))


def test_every_reader_takes_the_switch(tmp_path: Path) -> None:
    from neounify.data.media import read_sample_image
    from neounify.tasks.chat import read_conversation, read_images

    path = tmp_path / "photo.PNG"
    path.write_bytes(file_bytes(Image.new("RGB", (4, 4), COLOURS[0]), icc_profile=P3))
    message = {"role": "user", "content": [{"type": "image", "image": path}]}
    for profiles in (True, False):
        wanted = read_image(path, colour_profiles=profiles).getpixel((0, 0))
        images = [
            *read_images(path, colour_profiles=profiles),
            *read_images([path], colour_profiles=profiles),
            *read_conversation([message], [], colour_profiles=profiles)[1],
            read_sample_image(path, "photo", colour_profiles=profiles),
        ]
        assert [image.getpixel((0, 0)) for image in images] == [wanted] * 4
    assert wanted == COLOURS[0]
