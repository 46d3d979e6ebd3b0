"""Provenance metadata of images: written into PNG, JPEG and WebP, and read back, of MP4 too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import neounify
from neounify.errors import ImageError
from neounify.image.formats import isobmff_format
from neounify.image.io import read_metadata
from neounify.video.boxes import find_xmp, is_mp4

Format = Literal["png", "jpeg", "webp"]

CHUNK = "neounify"
"""The name of the PNG text chunk with the facts as JSON."""

QUALITY = 95
"""Of JPEG and lossy WebP, on the scale of 0 to 100 that both share."""

MAX_JPEG_PACKET_BYTES = 65504
"""Capacity of one XMP segment of a JPEG, in bytes."""

_XMP_CHUNK = "XML:com.adobe.xmp"


def encode_image(image: Image.Image, format: Format, facts: Mapping[str, object]) -> bytes:
    """Encode an image with its software, its source type (a trained model) and the facts.

    All formats carry an XMP packet; PNG carries the facts in a text chunk as well. PNG is
    lossless. Facts are anything JSON can say. Raises ImageError where they are too long for JPEG.
    """
    packet = write_packet(facts)
    if format == "jpeg" and len(packet) > MAX_JPEG_PACKET_BYTES:
        raise ImageError(
            f"the facts about the image take {len(packet)} bytes; "
            f"a JPEG holds {MAX_JPEG_PACKET_BYTES}: choose png or webp"
        )
    options: dict[str, Any] = {"xmp": packet, "quality": QUALITY}
    if format == "png":
        options = {"pnginfo": _chunks(packet, facts)}
    bare = image.copy()
    bare.info = {}  # comments or locations in the input are not passed on
    buffer = BytesIO()
    bare.save(buffer, format=format.upper(), **options)
    return buffer.getvalue()


def read_provenance(data: bytes) -> dict[str, Any]:
    """Origin that the file of an image or an MP4 declares; empty if it declares none.

    Values are those of JSON: numbers are numbers, settings are a dictionary.
    `made_by` and `source_type` are also read where other software wrote them. All of it can be
    forged and removed. Raises ImageError for anything that is not such an image.
    """
    if is_video(data):
        return read_packet(find_xmp(BytesIO(data)))
    info = read_metadata(data, (CHUNK, _XMP_CHUNK))
    packet = info.get("xmp") or info.get(_XMP_CHUNK) or b""
    facts = read_packet(packet.encode() if isinstance(packet, str) else packet)
    chunk = info.get(CHUNK)
    return facts | read_facts(chunk) if isinstance(chunk, str) else facts


def is_video(data: bytes) -> bool:
    """Whether a file is MP4 or QuickTime, by its beginning; images in such boxes are not."""
    return is_mp4(data[:8]) and isobmff_format(data) is None


def _chunks(packet: bytes, facts: Mapping[str, object]) -> PngInfo:
    chunks = PngInfo()
    chunks.add_itxt(_XMP_CHUNK, packet.decode())
    if facts:
        chunks.add_itxt(CHUNK, json.dumps(dict(facts), ensure_ascii=False))
    return chunks


GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""The IPTC's term for images that a trained model generated."""

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_NAMESPACE = "urn:neounify:provenance#"
_FACTS = f"{{{_NAMESPACE}}}Facts"
_NAMES = {f"{{{_XMP}}}CreatorTool": "made_by", f"{{{_IPTC}}}DigitalSourceType": "source_type"}

_NUMBERS = frozenset(("seed", "index", "count", "steps", "guidance", "image_guidance", "shift"))
"""Facts that are numbers, though a server writes them as text."""

_PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{rdf}"><rdf:Description rdf:about="" \
xmlns:xmp="{xmp}" xmlns:Iptc4xmpExt="{iptc}" xmlns:neounify="{namespace}" xmp:CreatorTool={tool} \
Iptc4xmpExt:DigitalSourceType={source} Iptc4xmpExt:AISystemUsed="neounify" \
Iptc4xmpExt:AISystemVersionUsed={version} neounify:Facts={facts}/></rdf:RDF></x:xmpmeta>\
<?xpacket end="r"?>"""


def write_packet(facts: Mapping[str, object]) -> bytes:
    """A packet that names the generating program, marks the image as synthetic, and lists facts."""
    version = neounify.__version__
    return _PACKET.format(
        rdf=_RDF,
        xmp=_XMP,
        iptc=_IPTC,
        namespace=_NAMESPACE,
        tool=quoteattr(f"neounify {version}"),
        source=quoteattr(GENERATED),
        version=quoteattr(version),
        # Escaped to ASCII, as XML has no way to write control characters and lone surrogates.
        facts=quoteattr(json.dumps(dict(facts))),
    ).encode()


def read_packet(packet: bytes) -> dict[str, Any]:
    """Content of a packet: `made_by`, `source_type`, and facts if neounify wrote it.

    Packets of other software give what they share with ours; damaged ones give nothing.
    """
    facts: dict[str, Any] = {}
    for description in _descriptions(packet):
        for name, ours in _NAMES.items():
            value = _property(description, name)
            if value:
                facts[ours] = value
    return facts | packet_facts(packet)


def packet_facts(packet: bytes) -> dict[str, Any]:
    """The facts that neounify wrote into a packet; none where it did not."""
    facts: dict[str, Any] = {}
    for description in _descriptions(packet):
        facts |= read_facts(description.get(_FACTS, "{}"))
    return facts


def read_facts(text: str) -> dict[str, Any]:
    """Facts from their JSON, numbers as numbers; none from damaged JSON."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(facts, dict):
        return {}
    return {name: _typed(name, value) for name, value in facts.items()}


def _typed(name: str, value: Any) -> Any:
    if name not in _NUMBERS or not isinstance(value, str) or len(value) > 40:
        return value
    try:
        number = json.loads(value)
    except ValueError:
        return value
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return number if is_number and math.isfinite(number) else value


def _descriptions(packet: bytes) -> list[ElementTree.Element]:
    if b"<!" in packet:  # a document type could define entities that grow without bound
        return []
    try:
        root = ElementTree.fromstring(packet.strip(b"\0 \r\n\t"))
    except (ElementTree.ParseError, ValueError, LookupError):
        return []
    return root.findall(f".//{{{_RDF}}}Description")


def _property(description: ElementTree.Element, name: str) -> str | None:
    """A simple property, which may stand as an attribute or as an element."""
    return description.get(name) or description.findtext(name)
