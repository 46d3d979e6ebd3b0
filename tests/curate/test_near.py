"""Near copies: exact pairs of hashes, recall on made copies, no stranger among a thousand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from neounify.curate.images import perceptual_hash
from neounify.curate.near import Words, first_within, hash_words, near_pairs
from support.curation import encoded, textured

COPIED, STRANGERS = 100, 1000


def changed(words: Words, bits: int, rng: np.random.Generator) -> Words:
    row = np.unpackbits(words.view(np.uint8))
    row[rng.choice(256, bits, replace=False)] ^= 1
    return np.packbits(row).view(np.uint64)


@pytest.mark.parametrize("distance", [0, 10, 31])
def test_pairs_are_those_of_all_comparisons(distance: int) -> None:
    rng = np.random.default_rng(distance)
    strangers = rng.integers(0, 2**64, (600, 4), dtype=np.uint64)
    copies = [changed(strangers[n].copy(), n % 40, rng) for n in range(400)]
    words = np.concatenate([strangers, copies])
    bits = np.bitwise_count(words[:, None] ^ words[None]).sum(axis=2)
    one, other = np.nonzero(np.triu(bits <= distance, 1))
    expected = np.column_stack([one, other, bits[one, other]])
    assert np.array_equal(near_pairs(words, distance), expected)
    assert len(expected) >= 10 * (distance + 1)


def test_without_a_probe_some_pairs_at_31_are_missed() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (2000, 4), dtype=np.uint64)
    copies = np.array([changed(row.copy(), 31, rng) for row in words])
    both = np.concatenate([words, copies])
    assert len(near_pairs(both, 31, probe=1)) == 2000
    assert 0.86 < len(near_pairs(both, 31, probe=0)) / 2000 < 0.92  # 89 % by calculation


def test_the_first_listed_hash_is_found() -> None:
    rng = np.random.default_rng(1)
    listed = rng.integers(0, 2**64, (50, 4), dtype=np.uint64)
    words = np.array([changed(listed[7].copy(), 31, rng), changed(listed[7].copy(), 32, rng)])
    assert list(first_within(words, listed, 31)) == [7, -1]


def captioned(image: Image.Image) -> Image.Image:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    style: dict[str, Any] = {
        "fill": "white",
        "stroke_width": 1,
        "stroke_fill": "black",
        "font_size": 16,
    }
    draw.text((8, 8), "A caption on top, 2026", **style)
    return image


def cropped(image: Image.Image) -> Image.Image:
    """Without 5 % of the area, evenly on all sides."""
    width, height = image.size
    off = (1 - 0.95**0.5) / 2
    left, top = round(width * off), round(height * off)
    return image.crop((left, top, width - left, height - top))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality)))


COPIES = {
    "half": (lambda image: image.resize((160, 160)), 0.99),
    "larger": (lambda image: image.resize((480, 480)), 0.99),
    "jpeg 40": (lambda image: jpeg(image, 40), 0.99),
    "jpeg 95": (lambda image: jpeg(image, 95), 0.99),
    "grey": (lambda image: image.convert("L").convert("RGB"), 0.99),
    "caption": (captioned, 0.99),
    "crop": (cropped, 0.90),
}


@pytest.fixture(scope="module")
def originals() -> list[Image.Image]:
    return [textured(n) for n in range(COPIED)]


@pytest.fixture(scope="module")
def hashes(originals: list[Image.Image]) -> Words:
    return hash_words([perceptual_hash(image)[0] for image in originals])


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found(name: str, originals: list[Image.Image], hashes: Words) -> None:
    copy, recall = COPIES[name]
    copies = hash_words([perceptual_hash(copy(image))[0] for image in originals])
    bits = np.bitwise_count(hashes ^ copies).sum(axis=1)
    assert (bits <= 31).mean() >= recall, sorted(bits)[-8:]


def test_no_stranger_is_a_copy() -> None:
    hashed = [perceptual_hash(textured(n, 128, 128)) for n in range(STRANGERS)]
    assert min(quality for _, quality in hashed) >= 50
    assert len(near_pairs(hash_words([content for content, _ in hashed]), 31)) == 0


def test_flat_images_have_no_sound_hash() -> None:
    gradient = np.linspace(100, 140, 320, dtype=np.uint8)
    image = Image.fromarray(np.tile(gradient, (320, 1))).convert("RGB")
    assert perceptual_hash(image)[1] < 50
    assert perceptual_hash(Image.new("RGB", (300, 300), "red"))[1] == 0
