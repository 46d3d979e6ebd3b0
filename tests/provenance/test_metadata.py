"""Facts about images survive encoding; damaged and foreign files do no harm."""

from __future__ import annotations

import json
from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import neounify
from neounify.errors import ImageError
from neounify.provenance.metadata import (
    GENERATED,
    Format,
    encode_image,
    read_packet,
    read_provenance,
    write_packet,
)
from neounify.video.clip import Video

FORMATS: tuple[Format, ...] = ("png", "jpeg", "webp")
BASE = {"made_by": f"neounify {neounify.__version__}", "source_type": GENERATED}


def example_image() -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize("format", FORMATS)
def test_facts_come_back(format: Format) -> None:
    facts = {"model": "scenes", "seed": "7", "created": "2026-01-01T19:04:05+00:00"}
    data = encode_image(example_image(), format, facts)
    assert read_provenance(data) == BASE | facts | {"seed": 7}
    with Image.open(BytesIO(data)) as image:
        assert (image.format or "").lower() == format
        assert image.size == (48, 40)


@settings(max_examples=30, deadline=None)
@given(
    facts=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"))
    ),
    format=st.sampled_from(FORMATS),
)
def test_any_text_comes_back(facts: dict[str, str], format: Format) -> None:
    assert read_provenance(encode_image(Image.new("RGB", (2, 2)), format, facts)) == BASE | facts


def test_png_keeps_the_pixels_and_the_types_of_values() -> None:
    data = encode_image(example_image(), "png", {"size": [48, 40], "note": '湖 <&">'})
    assert read_provenance(data) == BASE | {"size": [48, 40], "note": '湖 <&">'}
    with Image.open(BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), np.asarray(example_image()))
        assert GENERATED in image.info["XML:com.adobe.xmp"]


@pytest.mark.parametrize(
    ("written", "read"),
    [("7", 7), ("1.5", 1.5), ("NaN", "NaN"), ("true", "true"), ("[1]", "[1]"), ("x", "x")],
)
def test_numbers_that_were_written_as_text(written: str, read: object) -> None:
    data = encode_image(example_image(), "webp", {"seed": written, "note": written})
    assert read_provenance(data) == BASE | {"seed": read, "note": written}


def test_facts_too_long_for_jpeg() -> None:
    facts = {"prompt": "a" * 70_000}
    with pytest.raises(ImageError, match="choose png or webp"):
        encode_image(example_image(), "jpeg", facts)
    for format in ("png", "webp"):
        assert (
            read_provenance(encode_image(example_image(), format, facts))["prompt"]
            == facts["prompt"]
        )
    long = {"prompt": "a" * 64_000}
    assert read_provenance(encode_image(example_image(), "jpeg", long))["prompt"] == long["prompt"]


def test_what_the_image_itself_carried_is_not_passed_on() -> None:
    image = example_image()
    image.info = {"comment": b"home address", "xmp": b"<x/>"}
    for format in FORMATS:
        assert b"home address" not in encode_image(image, format, {})


@pytest.mark.parametrize("format", FORMATS)
def test_images_that_say_nothing(format: Format) -> None:
    buffer = BytesIO()
    example_image().save(buffer, format=format)
    assert read_provenance(buffer.getvalue()) == {}


def test_files_that_are_no_such_image() -> None:
    for data, message in ((b"", "empty"), (b"text", "not an image")):
        with pytest.raises(ImageError, match=message):
            read_provenance(data)


def test_facts_beside_text_of_any_size() -> None:
    data = encode_image(example_image(), "png", {"seed": "1"})
    chunks = PngInfo()
    chunks.add_text("workflow", "x" * 2**22, zip=True)
    buffer = BytesIO()
    example_image().save(buffer, format="png", pnginfo=chunks)
    head, behind = data[:33], buffer.getvalue()
    text = behind[33 : behind.index(b"IDAT") - 4]
    assert read_provenance(head + text + data[33:])["seed"] == 1


OTHER = """<x:xmpmeta xmlns:x="adobe:ns:meta/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"><rdf:RDF><rdf:Description>
 <xmp:CreatorTool>Other 1.0</xmp:CreatorTool></rdf:Description></rdf:RDF></x:xmpmeta>"""
ENTITY = '<!DOCTYPE x [<!ENTITY a "b">]>' + OTHER.replace("Other", "&a;")


@pytest.mark.parametrize(
    ("packet", "facts"),
    [
        (OTHER, {"made_by": "Other 1.0"}),
        (ENTITY, {}),
        ("<x", {}),
        ("", {}),
        ("\ud800", {}),
        ('<?xml version="1.0" encoding="nonsense"?><x/>', {}),
    ],
)
def test_packets_of_others(packet: str, facts: dict[str, str]) -> None:
    assert read_packet(packet.encode("utf-8", "surrogatepass")) == facts


@settings(max_examples=60, deadline=None)
@given(data=st.data(), format=st.sampled_from(FORMATS))
def test_damaged_files_give_facts_or_a_clear_error(data: st.DataObject, format: Format) -> None:
    whole = bytearray(encode_image(Image.new("RGB", (8, 8)), format, {"seed": "1"}))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for damaged in (bytes(whole), bytes(whole[:cut])):
        try:
            facts = read_provenance(damaged)
        except ImageError:
            continue
        assert json.dumps(facts)


def test_facts_of_a_video_come_back() -> None:
    video = Video(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), Fraction(8))
    facts = {"model": "motion", "seed": "7", "frames": "2"}
    assert read_provenance(video.to_bytes(xmp=write_packet(facts))) == BASE | facts | {"seed": 7}
    assert read_provenance(video.to_bytes()) == {}
    cut = video.to_bytes(xmp=write_packet(facts))[:-10]
    assert read_provenance(cut) == {}
