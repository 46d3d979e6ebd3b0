"""Pictures that say where they come from: written into PNG, JPEG and WebP, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from neounify.errors import ImageError
from neounify.image.io import read_metadata
from neounify.provenance.xmp import read_facts, read_packet, write_packet

Format = Literal["png", "jpeg", "webp"]

CHUNK = "neounify"
"""The name of the PNG text chunk with the facts as JSON."""

QUALITY = 95
"""Of JPEG and lossy WebP, on the scale of 0 to 100 that both share."""

MAX_JPEG_PACKET_BYTES = 65504
"""What one XMP segment of a JPEG holds, in bytes."""

_XMP_CHUNK = "XML:com.adobe.xmp"


def encode_image(image: Image.Image, format: Format, facts: Mapping[str, object]) -> bytes:
    """Encode a picture together with what made it, that a model did, and the facts.

    All formats carry an XMP packet; PNG carries the facts in a text chunk as well. PNG is
    lossless. Facts are anything JSON can say. Raises ImageError where they are too long for JPEG.
    """
    packet = write_packet(facts)
    if format == "jpeg" and len(packet) > MAX_JPEG_PACKET_BYTES:
        raise ImageError(
            f"the facts about the picture take {len(packet)} bytes; "
            f"a JPEG holds {MAX_JPEG_PACKET_BYTES}: choose png or webp"
        )
    options: dict[str, Any] = {"xmp": packet, "quality": QUALITY}
    if format == "png":
        options = {"pnginfo": _chunks(packet, facts)}
    bare = image.copy()
    bare.info = {}  # what the picture carried, a comment or a place, is not passed on
    buffer = BytesIO()
    bare.save(buffer, format=format.upper(), **options)
    return buffer.getvalue()


def read_provenance(data: bytes) -> dict[str, Any]:
    """What an image file says of its origin; empty if it says nothing.

    Values are what JSON can say: numbers are numbers, settings are a dictionary.
    `made_by` and `source_type` are also read where other software wrote them. Anybody can write
    and remove all of this. Raises ImageError for anything that is not such a picture.
    """
    info = read_metadata(data, (CHUNK, _XMP_CHUNK))
    packet = info.get("xmp") or info.get(_XMP_CHUNK) or b""
    found = read_packet(packet.encode() if isinstance(packet, str) else packet)
    chunk = info.get(CHUNK)
    return found | read_facts(chunk) if isinstance(chunk, str) else found


def _chunks(packet: bytes, facts: Mapping[str, object]) -> PngInfo:
    chunks = PngInfo()
    chunks.add_itxt(_XMP_CHUNK, packet.decode())
    if facts:
        chunks.add_itxt(CHUNK, json.dumps(dict(facts), ensure_ascii=False))
    return chunks
