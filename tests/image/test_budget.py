"""Budget of decoding: memory, pixels, reads; and the result of reducing an image."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neounify.errors import ImageError
from neounify.image import read_image
from neounify.image.io import MAX_READS, DecodeBudget, MeteredFile


def budget(**changes: int) -> DecodeBudget:
    limits = {"max_pixels": 10_000_000, "max_bytes": 64 * 2**20, "keep_pixels": 10_000}
    return DecodeBudget(**(limits | changes))


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def smooth(mode: str = "RGB", size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Colours that change slowly, so that means of squares are near every pixel in them."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {"quality": 95}),
        ("JPEG", "RGB", {"quality": 95, "progressive": True}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("WEBP", "RGB", {"quality": 95}),
        ("AVIF", "RGB", {"quality": 95}),
        ("BMP", "RGB", {}),
    ],
)
@pytest.mark.parametrize("size", [(640, 480), (643, 487), (2000, 300)])
def test_a_reduced_image_is_the_whole_one_in_small(
    kind: str, mode: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    image = smooth("L" if mode == "I;16" else mode, size)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    data = file_of(image, kind, **options)
    whole, small = read_image(data), read_image(data, budget=budget())
    factor = budget().factor(whole)
    assert factor > 1
    if kind != "JPEG":  # whose decoder reduces by powers of two
        assert small.size == (-(-whole.width // factor), -(-whole.height // factor))
    assert 10_000 <= small.width * small.height < 60_000
    expected = np.asarray(whole.resize(small.size, Image.Resampling.BOX), dtype=int)
    assert np.abs(np.asarray(small, dtype=int) - expected).max() <= 6


def test_a_small_image_is_read_as_without_a_budget() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        data = file_of(smooth(size=(150, 120)), kind)
        assert read_image(data, budget=budget()).tobytes() == read_image(data).tobytes()


def test_a_reduced_image_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(smooth(size=(800, 400)), "JPEG", exif=exif)
    small = read_image(data, budget=budget())
    assert small.height == 2 * small.width


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"progressive": True})],
)
def test_memory_is_known_before_decoding(kind: str, options: dict[str, Any]) -> None:
    data = file_of(Image.new("RGB", (1000, 1000)), kind, **options)
    with pytest.raises(ImageError, match="MiB; at most 1 are allowed"):
        read_image(data, budget=budget(max_bytes=2**20))
    assert read_image(data, budget=budget(max_bytes=17 * 2**20)).width < 200


def test_pixels_of_all_images_are_counted() -> None:
    png = file_of(Image.new("1", (1000, 1000)), "PNG")
    jpeg = file_of(Image.new("L", (1000, 1000)), "JPEG")
    for data, count, total in ((png, 2, "3,000,000"), (jpeg, 8, "2,250,000")):
        shared = budget(max_pixels=2_000_000)
        for _ in range(count):
            read_image(data, budget=shared)
        with pytest.raises(ImageError, match=f"2,000,000 pixels together, .* have {total}"):
            read_image(data, budget=shared)


def test_scans_of_a_progressive_jpeg_are_counted() -> None:
    data = file_of(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    read_image(data, budget=budget())
    with pytest.raises(ImageError, match="pixels together"):
        read_image(data[:-2] + last * 1000 + data[-2:], budget=budget())


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"P3 1 1 255 0 0 0", "PPM"),
        (b"P6 1 1 255\n\0\0\0", "PPM"),
        (file_of(Image.new("L", (8, 8)), "TIFF"), "TIFF"),
        (b"MM\0+", "TIFF"),
    ],
)
def test_formats_that_hide_their_cost_are_named(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=f"{kind} files are not read here; send PNG"):
        read_image(data, budget=budget())


def fill_bytes(count: int) -> bytes:
    data = file_of(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + b"\xff" * count + data[2:]


def comments(count: int) -> bytes:
    data = file_of(Image.new("P", (8, 8)), "GIF")
    start = data.index(b",\0\0\0\0")
    return data[:start] + b"!\xfe\0" * count + data[start:]


def empty_pixels(count: int) -> bytes:
    data = file_of(Image.new("RGB", (8, 8)), "PNG")
    return data[:33] + chunk(b"IDAT", b"") * count + data[33:]


def runs(count: int) -> bytes:
    """A BMP of `count` runs of one pixel."""
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + 40 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, 1000, count // 1000, 1, 8, 1, 0, 0, 0, 256, 0)
    return head + info + bytes(1024) + b"\1\0" * count + b"\0\1"


@pytest.mark.parametrize("make", [fill_bytes, comments, empty_pixels, runs])
def test_a_file_in_countless_pieces_is_given_up(make: Callable[[int], bytes]) -> None:
    with pytest.raises(ImageError, match=f"more than {MAX_READS} pieces"):
        read_image(make(MAX_READS + 1000))


def test_a_metered_file_is_a_file() -> None:
    file = MeteredFile(b"abc")
    assert (file.read(1), file.read(), file.read()) == (b"a", b"bc", b"")


def test_packed_metadata_is_unpacked_a_few_times_only() -> None:
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**20), 9))
    data = file_of(Image.new("RGB", (8, 8)), "PNG")
    assert read_image(data[:33] + text * 3000 + data[33:]).size == (8, 8)
