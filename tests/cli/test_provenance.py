"""`neounify provenance`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import neounify
from neounify.provenance.metadata import GENERATED, encode_image
from neounify.provenance.watermark import Marker

Run = Callable[..., Any]


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A JPEG with facts and a mark; the mark's library wants libGL.so.1."""
    pytest.importorskip("imwatermark", exc_type=ImportError)
    image = Marker(9).mark(Image.new("RGB", (64, 64), "teal"))
    path = tmp_path / "marked.jpg"
    path.write_bytes(encode_image(image, "jpeg", {"seed": "5", "note": "a\x1b[31mb"}))
    return path


def test_metadata_and_mark_are_shown(run_bare: Run, marked: Path, image_file: Path) -> None:
    ran = run_bare("provenance", marked.name, image_file.name)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == [
        "marked.jpg",
        f"  made_by: neounify {neounify.__version__}",
        f"  source_type: {GENERATED}",
        "  seed: 5",
        "  note: a\ufffd[31mb",
        "  invisible watermark: neounify:9",
        "image.png",
        "  no metadata about its origin",
        "  invisible watermark: none",
    ]


def test_as_json(run_bare: Run, marked: Path, image_file: Path) -> None:
    first, second = run_bare("provenance", marked.name, image_file.name, "--json").json["files"]
    assert first["file"] == "marked.jpg"
    assert first["metadata"]["seed"] == 5
    assert first["mark"] == "neounify:9"
    assert second == {"file": "image.png", "metadata": {}, "mark": None}


def test_images_of_the_command_line_carry_their_origin(run: Run) -> None:
    run("generate", "boat", "--size", "64x32", "--steps", "2", "--output", "boat.png")
    (entry,) = run("provenance", "boat.png", "--json").json["files"]
    assert entry["metadata"]["source_type"] == GENERATED
    assert entry["metadata"]["prompt"] == "boat"


def test_without_the_library_the_metadata_is_still_shown(
    run_bare: Run, marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    ran = run_bare("provenance", marked.name)
    assert ran.code == 0
    assert "seed: 5" in ran.out
    assert "invisible watermark" not in ran.out
    assert "watermarks are not read" in ran.err
    assert "mark" not in run_bare("provenance", marked.name, "--json").json["files"][0]


@pytest.mark.parametrize("data", [None, b"text"])
def test_files_that_are_no_images(run_bare: Run, tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "a.png").write_bytes(data)
    ran = run_bare("provenance", "a.png")
    assert ran.code == 1
    assert "a.png" in ran.err
    assert "Traceback" not in ran.err


def test_a_bad_file_does_not_hide_the_others(
    run_bare: Run, image_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    names = ("nope.png", image_file.name, "text.txt", ".")
    ran = run_bare("provenance", *names)
    assert ran.code == 1
    assert ran.out.splitlines()[0] == image_file.name
    missing, text, folder = (line for line in ran.err.splitlines() if line.startswith("error"))
    assert missing == "error: nope.png: cannot be read: No such file or directory"
    assert text.startswith("error: text.txt: not an image, or damaged")
    assert folder == "error: .: not a file"
    assert "BytesIO" not in ran.err
    ran = run_bare("provenance", *names, "--json")
    assert ran.code == 1
    entries = ran.json["files"]
    assert [entry["file"] for entry in entries] == list(names)
    assert ["error" in entry for entry in entries] == [True, False, True, True]


def test_json_has_the_types_of_what_was_written(run: Run) -> None:
    run("generate", "boat", "--size", "64x32", "--steps", "2", "--output", "boat.png")
    (entry,) = run("provenance", "boat.png", "--json").json["files"]
    metadata = entry["metadata"]
    assert metadata["seed"] == 0
    assert metadata["size"] == [64, 32]
    assert metadata["settings"]["steps"] == 2
    assert metadata["settings"]["system"] is None
    assert "  settings: {" in run("provenance", "boat.png").out


def test_help_has_an_example(run_bare: Run) -> None:
    assert "neounify provenance " in run_bare("provenance", "--help").out
