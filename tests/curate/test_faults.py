"""One known fault in each made image: every one is dropped for its reason, all others stay."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from neounify.curate import CurateError, curate
from neounify.curate.images import perceptual_hash
from neounify.data.shards import ShardData
from support.curation import (
    encoded,
    reasons_of,
    recipe_of,
    table_of,
    textured,
    write_samples,
)

TEXT = "a garden with stones number"


def flat(value: int) -> Image.Image:
    """Nearly one colour, with enough grain to be neither a border nor of low entropy."""
    rng = np.random.default_rng(value)
    noise = np.clip(value + rng.normal(0, 8, (320, 320, 3)), 0, 255)
    return Image.fromarray(noise.astype(np.uint8))


def two_values() -> Image.Image:
    """Black and white noise: sharp, of one bit."""
    bits = np.random.default_rng(5).integers(0, 2, (320, 320), dtype=np.uint8) * 255
    return Image.fromarray(bits).convert("RGB")


FAULTS: dict[str, tuple[bytes, str]] = {
    "cut": (encoded(textured(1))[:20_000], "readable.image"),
    "garbage": (b"not an image at all", "readable.image"),
    "huge": (encoded(Image.new("1", (11_000, 11_000))), "readable.image"),
    "small": (encoded(textured(2, 255, 400)), "geometry.min_side"),
    "long": (encoded(textured(3, 1000, 300)), "geometry.max_aspect"),
    "blurred": (
        encoded(textured(4).filter(ImageFilter.GaussianBlur(4))),
        "quality.min_sharpness",
    ),
    "two": (encoded(two_values()), "quality.min_entropy"),
    "dark": (encoded(flat(4)), "quality.min_luma"),
    "bright": (encoded(flat(254)), "quality.max_luma"),
    "bordered": (
        encoded(ImageOps.expand(textured(6), 60, (200, 30, 30))),
        "quality.max_border",
    ),
    "the-copy": (encoded(textured(100)), "exact.copy"),
    "near": (encoded(textured(101).crop((3, 3, 317, 317)), "JPEG", quality=95), "near.copy"),
}
NO_ENTROPY = {"min_entropy": 3.0}
"""Dark and bright noise has fewer than 4 bits; black and white has one."""


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    good = [(f"good-{n}", encoded(textured(n)), f"{TEXT} {n}") for n in range(100, 112)]
    bad = [(name, content, f"{TEXT} {name}") for name, (content, _) in FAULTS.items()]
    short = [("short", encoded(textured(200)), "stone")]
    missing = [("missing", b"", TEXT)]
    path = write_samples(folder / "in", [*bad, *good, *short, *missing])
    (folder / "in" / "missing.img").unlink()
    with path.open("a") as lines:
        lines.write('{"conversations": "nonsense"}\n')
    recipe = recipe_of({"web": path}, samples_per_unit=7, stages={"quality": NO_ENTROPY})
    summary = curate(recipe, folder / "out")
    assert summary.samples == {"web": len(good) + len(bad) + 3}
    assert summary.kept == {"web": len(good)}
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_dropped_for_its_reason(name: str, curated: Path) -> None:
    assert reasons_of(curated / "out")[name] == FAULTS[name][1]


def test_everything_else_is_kept_or_named(curated: Path) -> None:
    reasons = reasons_of(curated / "out")
    assert all(reasons[f"good-{n}"] is None for n in range(100, 112))
    assert reasons["short"] == "text.min_words"
    assert reasons["missing"] == "readable.image"
    assert reasons["samples.jsonl, line 27"] == "readable.record"
    assert len(reasons) == 27


def test_the_table_has_the_values_and_the_copies(curated: Path) -> None:
    rows = {row["id"]: row for row in table_of(curated / "out")}
    assert rows["the-copy"]["copy_of"] == "web/good-100"
    assert rows["near"]["copy_of"] == "web/good-101"
    assert 0 < rows["near"]["distance"] <= 31
    image = rows["good-100"]["images"][0]
    assert (image["width"], image["height"], image["format"], image["frames"]) == (
        320,
        320,
        "PNG",
        1,
    )
    assert image["sharpness"] > 100
    assert rows["good-100"]["text"]["words"] == 6
    assert rows["small"]["images"][0]["sharpness"] is None, "a sample ends at its first reason"
    assert "320x320" not in (rows["cut"]["detail"] or "")
    assert rows["cut"]["detail"]


def test_the_trainer_reads_what_is_kept(curated: Path) -> None:
    source = ShardData(path=str(curated / "out" / "shards")).build()
    samples = [source[number] for number in range(source.size)]
    assert [sample.id for sample in samples] == [f"good-{n}" for n in range(100, 112)]
    assert np.array_equal(samples[3].images[0].pixels(), np.asarray(textured(103)))
    assert samples[3].images[0].role == "target"
    assert samples[3].text("user") == f"{TEXT} 103"


def test_the_report_has_all_reasons_and_needs_no_network(curated: Path) -> None:
    page = (curated / "out" / "report.html").read_text("utf-8")
    for _, reason in FAULTS.values():
        assert reason in page
    assert "http" not in page
    assert "data:image/jpeg" in page


def test_known_bad_images_are_only_counted(tmp_path: Path) -> None:
    images = {name: textured(seed) for name, seed in (("one", 1), ("two", 2), ("three", 3))}
    contents = {name: encoded(image) for name, image in images.items()}
    changed = encoded(images["two"].resize((300, 300)), "JPEG", quality=70)
    path = write_samples(
        tmp_path / "in",
        [
            ("one", contents["one"], "secret words"),
            ("two", changed, "other secret words"),
            ("three", contents["three"], "a fine view"),
        ],
    )
    (tmp_path / "files.txt").write_text(
        f"# comment\n{hashlib.sha256(contents['one']).hexdigest().upper()}\n"
    )
    (tmp_path / "hashes.txt").write_text(f"{perceptual_hash(images['two'])[0].hex()},100\n")
    lists = {"sha256": str(tmp_path / "files.txt"), "hashes": str(tmp_path / "hashes.txt")}
    summary = curate(recipe_of({"web": path}, stages={"known": lists}), tmp_path / "out")
    assert summary.dropped == {"web": {"known.hash": 1, "known.sha256": 1}}
    rows = {row["id"]: row for row in table_of(tmp_path / "out")}
    assert not rows["one"]["images"]
    assert rows["one"]["text"] is None
    assert not rows["two"]["images"]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "data:image" not in page
    for part in tmp_path.joinpath("out").rglob("*"):
        if part.is_file():
            assert b"secret" not in part.read_bytes()


def test_a_damaged_list_is_one_error(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "in", [("one", encoded(textured(1)), "a fine view")])
    (tmp_path / "files.txt").write_text("abc\n")
    recipe = recipe_of({"web": path}, stages={"known": {"sha256": str(tmp_path / "files.txt")}})
    with pytest.raises(CurateError, match=r"files.txt, line 1: not a SHA-256 of 64 hex digits"):
        curate(recipe, tmp_path / "out")


def test_a_source_that_is_mostly_unreadable_is_an_error(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "in", [(f"n{n}", b"nothing", "a view") for n in range(4)])
    with pytest.raises(CurateError, match="4 of 4 samples of source web cannot be read"):
        curate(recipe_of({"web": path}), tmp_path / "out")


def test_roles_decide_which_images_a_stage_looks_at(tmp_path: Path) -> None:
    blurred = encoded(textured(4).filter(ImageFilter.GaussianBlur(4)))
    path = write_samples(tmp_path / "in", [("asked", blurred, "Is it sharp?")], role="input")
    curate(recipe_of({"web": path}), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"asked": None}
    both = {"quality": {"on": ["input", "target"]}}
    curate(recipe_of({"web": path}, stages=both, max_unreadable=1.0), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"asked": "quality.min_sharpness"}
