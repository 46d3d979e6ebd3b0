"""PNG chunks that are not pixels: of any size and in any state, they never decide."""

from __future__ import annotations

import io
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from image.test_io import chunk, file_bytes, pixels, png, rgb_image
from neounify.errors import ImageError
from neounify.image import read_image
from neounify.image.io import read_metadata

ROWS = b"\0\x10\x20\x30"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("international", [False, True])
@pytest.mark.parametrize("size", [1_500_000, 70 * 2**20])
def test_text_of_any_size_is_skipped(zipped: bool, international: bool, size: int) -> None:
    info = PngInfo()
    add = info.add_itxt if international else info.add_text
    add("workflow", "x" * size, zip=zipped)
    add("XML:com.adobe.xmp", "x" * size, zip=zipped)
    assert pixels(read_image(file_bytes(rgb_image(), pnginfo=info))) == pixels(rgb_image())


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"key\0\0" + b"damaged"),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + b"damaged"),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + b"damaged"),
        chunk(b"tEXt", b"key\0text")[:-4] + b"crc?",
        chunk(b"iCCP", b"name\0\1" + zlib.compress(b"profile")),
        chunk(b"iCCP", b""),
        chunk(b"iCCP", b"n" * 90),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"\0"),
        chunk(b"pHYs", b"\0"),
        chunk(b"sRGB", b""),
        chunk(b"acTL", b"\0"),
        chunk(b"eXIf", b"no EXIF"),
        chunk(b"eXIf", b"x" * 2**21),
        chunk(b"juNk", b"x" * 2**22),
    ],
)
def test_damaged_metadata_is_skipped(extra: bytes) -> None:
    assert pixels(read_image(png(1, 1, 8, 2, ROWS, extra))) == [[0x10, 0x20, 0x30]]


def test_text_behind_the_pixels_is_skipped() -> None:
    data = file_bytes(rgb_image())
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 2**22))
    assert pixels(read_image(data[:-12] + text + data[-12:] + b"behind the end")) == pixels(
        rgb_image()
    )


@pytest.mark.parametrize("chunk_name", ["xmp", "xmp zipped", "eXIf", "raw"])
def test_the_orientation_survives(chunk_name: str) -> None:
    info, exif = PngInfo(), Image.Exif()
    exif[0x0112] = 6
    if chunk_name.startswith("xmp"):
        packet = '<x:xmpmeta xmlns:tiff="t" tiff:Orientation="6"/>'
        info.add_itxt("XML:com.adobe.xmp", packet, zip=chunk_name.endswith("zipped"))
    elif chunk_name == "raw":
        content = exif.tobytes()
        info.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n")
    data = file_bytes(rgb_image(), pnginfo=info, exif=exif if chunk_name == "eXIf" else b"")
    assert read_image(data).size == (4, 6)


def test_damaged_pixels_are_still_refused() -> None:
    data = bytearray(file_bytes(rgb_image()))
    data[data.index(b"IDAT") + 6] ^= 255
    with pytest.raises(ImageError):
        read_image(bytes(data))


def test_metadata_is_that_of_the_keys() -> None:
    info = PngInfo()
    info.add_text("mine", "one")
    info.add_text("theirs", "x" * 2**22, zip=True)
    data = file_bytes(rgb_image(), pnginfo=info)
    assert read_metadata(data, ["mine"])["mine"] == "one"
    assert "theirs" not in read_metadata(io.BytesIO(data).getvalue(), ["theirs"])
