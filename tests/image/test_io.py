"""Reading images: every mode and file kind, orientation, transparency, hostile files."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from neounify.errors import ImageError
from neounify.image import MAX_DECODED_PIXELS, read_image
from neounify.image import io as image_io

SIZE = (6, 4)


def rgb_image() -> Image.Image:
    values = np.arange(SIZE[0] * SIZE[1] * 3, dtype=np.uint8).reshape(SIZE[1], SIZE[0], 3)
    return Image.fromarray(values * 3)


def file_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> list[list[int]]:
    """Return [r, g, b] per pixel, row by row."""
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """Write a PNG by hand, for what PIL cannot write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "WEBP"])
def test_every_file_kind_is_read(kind: str) -> None:
    image = Image.new("RGB", SIZE, (200, 100, 50))
    for values in pixels(read_image(file_bytes(image, kind))):
        assert np.allclose(values, (200, 100, 50), atol=4)


def test_lossless_pixels_are_exact() -> None:
    assert pixels(read_image(file_bytes(rgb_image()))) == pixels(rgb_image())


def test_every_source_is_read(tmp_path: Path) -> None:
    data = file_bytes(rgb_image())
    path = tmp_path / "wrong-name.jpg"
    path.write_bytes(data)
    with path.open("rb") as file:
        sources: list[Any] = [path, str(path), data, bytearray(data), memoryview(data), file]
        for source in [*sources, rgb_image(), Image.open(path)]:
            assert pixels(read_image(source)) == pixels(rgb_image())


def test_a_pil_image_is_copied() -> None:
    source = rgb_image()
    read_image(source).putpixel((0, 0), (9, 9, 9))
    assert source.getpixel((0, 0)) != (9, 9, 9)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = rgb_image()
    # How a camera that tags `orientation` stores the upright image.
    stored = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_270],
        8: [Image.Transpose.ROTATE_270],
    }
    image = upright
    for step in stored.get(orientation, []):
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    read = read_image(file_bytes(image, kind, exif=exif, **options))
    assert pixels(read) == pixels(upright)
    assert read.size == SIZE
    assert pixels(read_image(read)) == pixels(upright)
    assert not read.info
    assert not read.getexif()


def test_jpeg_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(file_bytes(rgb_image(), "JPEG", exif=exif)).size == (SIZE[1], SIZE[0])


@pytest.mark.parametrize("orientation", [0, 9, 70000, "six"])
def test_nonsense_orientation_is_ignored(orientation: object) -> None:
    image = rgb_image()
    image.getexif()[0x0112] = orientation
    assert read_image(image).size == SIZE


def test_broken_exif_is_ignored() -> None:
    data = file_bytes(rgb_image(), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert read_image(data).size == SIZE


def half_transparent(mode: str) -> Image.Image:
    """One black pixel: opaque, then half, then fully transparent."""
    alpha = Image.fromarray(np.array([[255, 128, 0]], dtype=np.uint8))
    return Image.merge("RGBA", [*Image.new("RGB", (3, 1)).split(), alpha]).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    source = half_transparent("LA").convert("La") if mode == "La" else half_transparent(mode)
    assert pixels(read_image(source)) == [[0] * 3, [127] * 3, [255] * 3]


def test_pa_alpha_is_laid_on_white() -> None:
    palette = Image.new("PA", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), (1, 255))
    palette.putpixel((1, 0), (1, 0))
    assert pixels(read_image(palette)) == [[40, 50, 60], [255, 255, 255]]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_transparency_is_laid_on_white(kind: str, transparency: object) -> None:
    if kind == "GIF" and isinstance(transparency, bytes):
        transparency = 1
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = file_bytes(image, kind, transparency=transparency)
    assert pixels(read_image(data)) == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "kept"),
    [
        (8, 2, b"\x12\x12\x12\x80\x80\x80", b"\0\x12\0\x12\0\x12", 0x80),
        (16, 2, b"\x12\x34" * 3 + b"\x80\x00" * 3, b"\x12\x34" * 3, 0x80),
        (8, 0, b"\x12\x80", b"\0\x12", 0x80),
        (16, 0, b"\x12\x34\x80\x80", b"\x12\x34", 0x80),
        (4, 0, b"\x28", b"\0\x02", 0x88),
        (2, 0, b"\x60", b"\0\x01", 0xAA),
        (1, 0, b"\x80", b"\0\x01", 0),
    ],
)
def test_a_transparent_colour_is_laid_on_white(
    depth: int, colour: int, row: bytes, transparent: bytes, kept: int
) -> None:
    data = png(2, 1, depth, colour, b"\0" + row, chunk(b"tRNS", transparent))
    assert pixels(read_image(data)) == [[255] * 3, [kept] * 3]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_16_bit_greys_are_scaled(mode: str) -> None:
    values = np.array([[0, 256, 32896, 65535]])
    kinds = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I": "<i4"}
    image = Image.frombytes(mode, (4, 1), values.astype(kinds[mode]).tobytes())
    assert pixels(read_image(image)) == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_files_are_scaled(kind: str) -> None:
    image = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    assert pixels(read_image(file_bytes(image, kind))) == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-5.0, 127.6, 300.0], [0, 128, 255]),
        ([float("nan"), float("-inf"), float("inf")], [0, 0, 255]),
    ],
)
def test_float_greys(values: list[float], levels: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert [level for level, _, _ in pixels(read_image(image))] == levels


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGB"])
@pytest.mark.parametrize("colour", ["white", "black", "red"])
def test_other_modes_keep_their_colour(mode: str, colour: str) -> None:
    rgb = Image.new("RGB", (2, 2), colour)
    if mode == "LAB":
        lab = {"white": (255, 128, 128), "black": (0, 128, 128), "red": (138, 209, 198)}
        image = Image.new("LAB", (2, 2), lab[colour])
    else:
        image = rgb.convert(mode)
    grey = {"1": 76, "L": 76}.get(mode) if colour == "red" else None
    expected = [grey] * 3 if grey else pixels(rgb)[0]
    if mode == "1" and colour == "red":
        assert {tuple(value) for value in pixels(read_image(image))} <= {(0,) * 3, (255,) * 3}
    else:
        assert np.allclose(pixels(read_image(image)), expected, atol=6 if mode == "LAB" else 3)


def test_cmyk_jpeg() -> None:
    data = file_bytes(Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "JPEG")
    assert np.allclose(pixels(read_image(data)), (255, 0, 0), atol=6)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_only_the_first_frame_counts(kind: str) -> None:
    first, second = Image.new("RGB", SIZE, "black"), Image.new("RGB", SIZE, "white")
    data = file_bytes(first, kind, save_all=True, append_images=[second])
    assert np.max(pixels(read_image(data))) < 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_cut_off_files_are_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_bytes(Image.fromarray(noise), kind)
    for length in (1, 10, len(data) // 4, len(data) // 2):
        with pytest.raises(ImageError):
            read_image(data[:length])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
def test_corrupt_files_never_raise_anything_else(kind: str, edits: list[tuple[int, int]]) -> None:
    data = bytearray(file_bytes(rgb_image(), kind))
    for offset, value in edits:
        data[offset % len(data)] = value
    with suppress(ImageError):
        assert read_image(bytes(data), max_pixels=10**6).mode == "RGB"


@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        read_image(data)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "JPEG2000"])
def test_other_formats_are_refused_unread(kind: str) -> None:
    data = file_bytes(rgb_image(), kind)
    with pytest.raises(ImageError, match="not an image, or damaged; use PNG, JPEG"):
        read_image(data)


def test_an_opened_eps_is_refused_before_it_runs() -> None:
    opened = Image.open(io.BytesIO(file_bytes(rgb_image(), "EPS")))
    with pytest.raises(ImageError, match="EPS files are not read"):
        read_image(opened)


@pytest.mark.parametrize(
    ("side", "message"),
    [(12000, "144000000 pixels; at most 1000000 are decoded"), (60000, "too many pixels")],
)
def test_a_decompression_bomb_is_refused_by_its_header(side: int, message: str) -> None:
    # The pixels are missing: decoding would fail otherwise, and take long.
    with pytest.raises(ImageError, match=message):
        read_image(png(side, side, 8, 2, b""), max_pixels=10**6)
    with pytest.raises(ImageError):
        read_image(png(side, side, 8, 2, b""))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM"])
def test_large_images_below_the_limit_warn_about_nothing(kind: str) -> None:
    data = bytearray(file_bytes(Image.new("1", (10000, 10000)), kind))
    assert MAX_DECODED_PIXELS > 10000 * 10000
    with pytest.raises(ImageError, match="10000x10000 is 100000000 pixels"):
        read_image(bytes(data), max_pixels=10**7)


def test_max_pixels_is_inclusive() -> None:
    data = file_bytes(rgb_image())
    assert read_image(data, max_pixels=24).size == SIZE
    with pytest.raises(ImageError, match="6x4 is 24 pixels; at most 23"):
        read_image(data, max_pixels=23)
    with pytest.raises(ImageError, match="6x4 is 24 pixels; at most 23"):
        read_image(rgb_image(), max_pixels=23)


def test_empty_images_are_refused() -> None:
    with pytest.raises(ImageError, match="has no pixels, its size is 0x5"):
        read_image(Image.new("RGB", (0, 5)))
    with pytest.raises(ImageError):
        read_image(png(0, 5, 8, 2, b""))


def closed_file() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.png", "no such file"),
        (lambda folder: folder, "not a file"),
        (lambda folder: "a\0b", "a"),
        (lambda folder: b"", "empty"),
        (lambda folder: io.StringIO("text"), "binary mode"),
        (lambda folder: closed_file(), "cannot be read"),
        (lambda folder: 3, "not int"),
        (lambda folder: None, "not NoneType"),
    ],
)
def test_wrong_sources(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_image(make(tmp_path))


def test_too_large_a_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = file_bytes(rgb_image())
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(image_io, "MAX_FILE_BYTES", len(data) - 1)
    for source in (data, io.BytesIO(data), tmp_path / "a.png"):
        with pytest.raises(ImageError, match=f"larger than {len(data) - 1} bytes"):
            read_image(source)
