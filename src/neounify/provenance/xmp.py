"""XMP packets: the metadata that PNG, JPEG and WebP share, under the names photo software knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import neounify

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""The IPTC's term for pictures that a trained model made."""

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_OWN = "urn:neounify:provenance#"
_FACTS = f"{{{_OWN}}}Facts"
_NAMES = {f"{{{_XMP}}}CreatorTool": "made_by", f"{{{_IPTC}}}DigitalSourceType": "source_type"}

_NUMBERS = frozenset(("seed", "index", "count", "steps", "guidance", "image_guidance", "shift"))
"""Facts that are numbers, though a server writes them as text."""

_PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{rdf}"><rdf:Description rdf:about="" \
xmlns:xmp="{xmp}" xmlns:Iptc4xmpExt="{iptc}" xmlns:neounify="{own}" xmp:CreatorTool={tool} \
Iptc4xmpExt:DigitalSourceType={source} Iptc4xmpExt:AISystemUsed="neounify" \
Iptc4xmpExt:AISystemVersionUsed={version} neounify:Facts={facts}/></rdf:RDF></x:xmpmeta>\
<?xpacket end="r"?>"""


def write_packet(facts: Mapping[str, object]) -> bytes:
    """A packet that says what made the picture, that a model did, and the facts as JSON."""
    version = neounify.__version__
    return _PACKET.format(
        rdf=_RDF,
        xmp=_XMP,
        iptc=_IPTC,
        own=_OWN,
        tool=quoteattr(f"neounify {version}"),
        source=quoteattr(GENERATED),
        version=quoteattr(version),
        # Escaped to ASCII, as XML has no way to write control characters and lone surrogates.
        facts=quoteattr(json.dumps(dict(facts))),
    ).encode()


def read_packet(packet: bytes) -> dict[str, Any]:
    """What a packet says: `made_by`, `source_type`, and facts if neounify wrote it.

    Packets of other software give what they share with ours; damaged ones give nothing.
    """
    found: dict[str, Any] = {}
    for description in _descriptions(packet):
        for name, ours in _NAMES.items():
            value = _property(description, name)
            if value:
                found[ours] = value
        found |= read_facts(description.get(_FACTS, "{}"))
    return found


def read_facts(text: str) -> dict[str, Any]:
    """Facts from their JSON, numbers as numbers. Nothing from damaged JSON."""
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
