"""Image files that are small, and cost memory or time if they are decoded without a limit."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

from PIL import Image

Size = tuple[int, int]
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of an image."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size: Size, bits: int = 1, colours: int = 0, extra: bytes = b"") -> bytes:
    """A PNG of zeros, packed row by row; `colours` is PNG's type, `extra` chunks of any kind."""
    width, height = size
    row = bytes(1 + (width * bits * _CHANNELS[colours] + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(768)) if colours == 3 else b""
    parts = chunk(b"IHDR", head), extra, palette, chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_claim(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0"))


def packed_chunk(kind: bytes, key: bytes, size: int) -> bytes:
    """A chunk that unpacks to `size` bytes."""
    return chunk(kind, key + b"\0\0" + zlib.compress(bytes(size), 9))


def raw_png(size: Size) -> bytes:
    """An RGB PNG that is not packed at all: as large as its pixels."""
    width, height = size
    packer = zlib.compressobj(0)
    row = b"\0" + bytes(range(256)) * (width * 3 // 256 + 1)
    rows = row[: 1 + 3 * width] * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = packer.compress(rows) + packer.flush()
    parts = chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif(entries: int, each: int) -> bytes:
    """EXIF whose entries all refer to the same `each` bytes."""
    head = struct.pack("<2sHIH", b"II", 42, 8, entries)
    table = b"".join(struct.pack("<HHII", 0x8000 + n, 1, each, 0) for n in range(entries))
    return (head + table + bytes(4)).ljust(each, b"\0")


def jpeg_with(segments: bytes) -> bytes:
    """A JPEG with something between its start and its content."""
    data = saved(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + segments + data[2:]


def jpeg_exif(content: bytes) -> bytes:
    """A JPEG with EXIF in as many segments as it needs."""
    parts = [b"Exif\0\0" + content[n : n + 65_000] for n in range(0, len(content), 65_000)]
    return jpeg_with(b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in parts))


def jpeg_scans(size: Size, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = saved(Image.new("L", size), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def gif_with(blocks: bytes) -> bytes:
    """A GIF with something in front of its image."""
    data = saved(Image.new("P", (8, 8)), "GIF")
    start = data.index(b",\0\0\0\0")
    return data[:start] + blocks + data[start:]


def bmp_runs(width: int, height: int) -> bytes:
    """A BMP of runs of one pixel each."""
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + 40 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return head + info + bytes(1024) + b"\1\0" * (width * height) + b"\0\1"


def bmp_claim(width: int, height: int) -> bytes:
    """A BMP of one-byte pixels that holds none."""
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + 40 + 1024)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 0, 0, 0, 0, 256, 0)


def small_files() -> dict[str, bytes]:
    """Files of less than 700 kB each."""
    k = 1000
    icc = packed_chunk(b"iCCP", b"x", 5 * k * k)
    text = packed_chunk(b"zTXt", b"Raw profile type exif", k * k)
    black = Image.new("RGB", (6000, 6000))
    files = {
        "png of 50 MP, one bit": png((7060, 7060)),
        "png of 50 MP, palette": png((7060, 7060), 8, 3),
        "png of 49 MP, grey 16": png((7000, 7000), 16),
        "png of 25 MP, RGB": png((5000, 5000), 8, 2),
        "png of 25 MP, RGBA 16": png((5000, 5000), 16, 6),
        "png of 49 MP, RGBA": png((7000, 7000), 8, 6),
        "png of 49 MP, grey and alpha": png((7000, 7000), 8, 4),
        "png as wide as allowed": png((50_000_000, 1)),
        "png as high as allowed": png((1, 5_000_000)),
        "png that claims 10 GP": png_claim(100_000, 100_000),
        "png that claims 50 MP": png_claim(7000, 7000),
        "png with packed text": png((8, 8), extra=text * 500),
        "png with packed profiles": png((8, 8), extra=icc * 100),
        "png of empty chunks": png((8, 8), extra=chunk(b"teSt", b"") * 50 * k),
        "png of empty pixels": png((8, 8), extra=chunk(b"IDAT", b"") * 50 * k),
        "png with exif of many entries": png((8, 8), extra=chunk(b"eXIf", exif(3000, 600 * k))),
        "jpeg of 36 MP": saved(black, "JPEG"),
        "jpeg of 36 MP, progressive": saved(black, "JPEG", progressive=True, subsampling=0),
        "jpeg of 1000 scans": jpeg_scans((5000, 5000), 1000),
        "jpeg of 60 scans": jpeg_scans((7000, 7000), 60),
        "jpeg of 100k scans": jpeg_scans((64, 64), 20 * k),
        "jpeg with exif of many entries": jpeg_exif(exif(4000, 60 * k)),
        "jpeg with exif in many segments": jpeg_exif(exif(3000, 600 * k)),
        "jpeg of empty segments": jpeg_with(b"\xff\xfe\0\2" * 150 * k),
        "jpeg of fill bytes": jpeg_with(b"\xff" * 600 * k),
        "gif of 49 MP": saved(Image.new("P", (7000, 7000)), "GIF"),
        "gif of one long comment": gif_with(b"!\xfe" + (b"\xff" + b"a" * 255) * 2000 + b"\0"),
        "gif of many comments": gif_with(b"!\xfe\0" * 200 * k),
        "gif of a comment in bytes": gif_with(b"!\xfe" + b"\1a" * 250 * k + b"\0"),
        "webp of 12 MP": saved(Image.new("RGB", (3500, 3500)), "WEBP", lossless=True, method=0),
        "webp of 49 MP": saved(Image.new("RGB", (7000, 7000)), "WEBP", lossless=True, method=0),
        "webp with exif of many entries": saved(
            Image.new("RGB", (8, 8)), "WEBP", exif=exif(3000, 600 * k)
        ),
        "bmp of runs of one pixel": bmp_runs(500, 500),
        "bmp that claims 49 MP": bmp_claim(7000, 7000),
        "plain ppm": b"P3 400 400 255\n" + b"1 " * 300 * k,
        "plain pbm that claims 49 MP": b"P1 7000 7000\n" + b"1" * 600 * k,
        "tiff of 49 MP": saved(Image.new("1", (7000, 7000)), "TIFF", compression="group4"),
    }
    if "AVIF" in Image.registered_extensions().values():
        files["avif of 49 MP"] = saved(Image.new("RGB", (7000, 7000)), "AVIF", speed=10)
        files["avif of 16 MP"] = saved(Image.new("RGB", (4000, 4000)), "AVIF", speed=10)
    return files


def large_files() -> dict[str, bytes]:
    """Files of up to 45 MB."""
    m = 1000 * 1000
    return {
        "png of 14 MP, not packed": raw_png((3800, 3800)),
        "png of empty chunks": png((8, 8), extra=chunk(b"teSt", b"") * (3 * m)),
        "png of empty pixels": png((8, 8), extra=chunk(b"IDAT", b"") * (3 * m)),
        "png with packed text": png(
            (8, 8), extra=packed_chunk(b"zTXt", b"Raw profile type exif", m) * 30_000
        ),
        "jpeg of fill bytes": jpeg_with(b"\xff" * 45 * m),
        "jpeg of empty segments": jpeg_with(b"\xff\xfe\0\2" * (11 * m)),
        "gif of many comments": gif_with(b"!\xfe\0" * (15 * m)),
        "gif of a comment in bytes": gif_with(b"!\xfe" + b"\1a" * (22 * m) + b"\0"),
        "bmp of runs of one pixel": bmp_runs(4700, 4700),
        "no image at all": bytes(45 * m),
    }
