"""File names and whole files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neounify.cli.command import CliError, UsageError
from neounify.cli.convert import parse_bytes
from neounify.cli.files import check_apart, slug, write_new, write_whole
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


def test_an_output_is_apart_from_what_is_read(tmp_path: Path) -> None:
    model = tmp_path / "models" / "a"
    model.mkdir(parents=True)
    weights = model / "a.gguf"
    weights.touch()
    (tmp_path / "links").mkdir()
    linked = tmp_path / "links" / "b.gguf"
    linked.symlink_to(weights)
    (tmp_path / "same").symlink_to(model)
    for output, source, how in (
        (model, model, "is"),
        (model / ".." / "a", model, "is"),
        (tmp_path / "same", model, "is"),
        (model, tmp_path / "same", "is"),
        (weights, linked, "is"),
        (model, weights, "contains"),
        (tmp_path / "models", weights, "contains"),
        (tmp_path / "models", model, "contains"),
        (model, linked, "contains"),
        (tmp_path / "links", linked, "contains"),
        (tmp_path / "same", linked, "contains"),
    ):
        with pytest.raises(CliError, match=f"{output.name} {how} .*write to another folder"):
            check_apart(output, None, tmp_path / "other", source)
    for output in (model / "int8", tmp_path / "models" / "a-int8", tmp_path / "links" / "c"):
        check_apart(output, model, weights, linked, None)
    check_apart(tmp_path / "other", tmp_path / "other" / ".." / "models" / "a")


@pytest.mark.parametrize(
    "command",
    [
        "quantise store/toy -o store/toy --no-parity",
        "quantise store/toy -o store --no-parity",
        "quantise store/toy/model.safetensors -o store/toy --no-parity",
        "quantise one/weights.safetensors --config store/toy -o one --no-parity",
        "quantise one/weights.safetensors --config store/toy -o store/toy --no-parity",
        "quantise one/weights.safetensors --config store/toy -o store --to q8_0 --no-parity",
        "convert store/toy/model.safetensors store/toy",
        "convert store/toy/model.safetensors store --to q8_0",
        "convert one/weights.safetensors one --config store/toy",
        "convert one/weights.safetensors store/toy --config store/toy",
        "convert store/toy one --lora one/lora.safetensors:0.5",
        "convert store/toy one/lora.safetensors --lora one/lora.safetensors --lora-form published",
        "convert store/toy store/toy/model.safetensors --lora one/lora.safetensors "
        "--lora-form published",
        "convert dcp dcp/model --from-dcp --config store/toy",
        "parity store/toy one/weights.safetensors --config store/toy -o one",
        "parity store/toy store/toy -o store",
    ],
)
def test_overwriting_keeps_what_a_command_reads(
    run_bare: Callable[..., Any], toy: Path, command: str
) -> None:
    shutil.copytree(toy, "store/toy")
    for file in ("one/weights.safetensors", "one/lora.safetensors", "dcp/model/.metadata"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy / "model.safetensors", file)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    ran = run_bare(*command.split(), "--overwrite")
    assert ran.code == 1
    assert "which is read; write to another folder" in ran.err
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


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
