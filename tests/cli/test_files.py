"""File names and whole files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neounify.cli.command import UsageError
from neounify.cli.convert import parse_bytes
from neounify.cli.files import slug, write_new, write_whole
from neounify.cli.models import parse_loras


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A Red  Boat, on a lake!", "a-red-boat-on-a-lake"),
        ("../../etc/passwd", "etc-passwd"),
        ("湖のボート", "湖のボート"),
        ("", "untitled"),
        ("\x00/\\:*?", "untitled"),
        ("\ud800", "untitled"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word"),
        ("x" * 500, "x" * 48),
    ],
)
def test_slugs(text: str, name: str) -> None:
    assert slug(text) == name


def test_slugs_fit_into_file_names(tmp_path: Path) -> None:
    for letter in ("é", "湖", "𝒳"):
        (tmp_path / f"{slug(letter * 300)}_s18446744073709551615_64-100.png").touch()


def test_new_files_replace_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert write_new(path, b"one")
    assert not write_new(path, b"two")
    assert path.read_bytes() == b"one"
    write_whole(path, b"three")
    assert path.read_bytes() == b"three"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_without_hard_links_files_are_new_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "a"
    assert write_new(path, b"one")
    assert not write_new(path, b"two")
    assert path.read_bytes() == b"one"


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", b"one")
    assert not list(tmp_path.iterdir())


def test_lora_strengths(tmp_path: Path) -> None:
    file = tmp_path / "x:y.safetensors"
    file.touch()
    assert parse_loras([str(file), f"{file}:0.5", "C:gone"]) == [
        (file, 1.0),
        (file, 0.5),
        (Path("C:gone"), 1.0),
    ]
    with pytest.raises(UsageError, match="no number"):
        parse_loras([f"{file}:strong"])


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("17", 17), ("2K", 2000)]
)
def test_sizes_in_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count
