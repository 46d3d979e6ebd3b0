"""Hostile and damaged input: counted with a reason, or one clear error."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from neounify.curate import CurateError, CurateRecipe, curate, recipe_from_table
from neounify.curate import parts as parts_module
from neounify.curate.images import perceptual_hash
from neounify.data.shards import ShardData
from support.curation import encoded, reasons_of, recipe_of, table_of, textured, write_samples


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shards(path: Path, **settings: Any) -> CurateRecipe:
    source = {"name": "web", "kind": "shards", "path": str(path)}
    return recipe_from_table({"sources": [source], **settings})


def test_shards_with_odd_members(tmp_path: Path) -> None:
    good = encoded(textured(1))
    outside = json.dumps(
        {
            "conversations": [
                {"from": "human", "value": "a view of it"},
                {"from": "gpt", "value": "<image>"},
            ],
            "image": "../../etc/passwd",
        }
    ).encode()
    members = [
        ("good.png", good),
        ("good.txt", b"a view of one"),
        ("outside.json", outside),
        ("nested.json", b"[" * 5000),
        ("list.json", b"[1, 2]"),
        ("alone.txt", b"no image"),
        ("latin.png", good),
        ("latin.txt", b"\xff\xfe\xfa"),
    ]
    path = tar_of(tmp_path / "a.tar", members)
    summary = curate(shards(path, max_unreadable=1.0), tmp_path / "out")
    assert summary.kept == {"web": 1}
    reasons = reasons_of(tmp_path / "out")
    assert reasons["a-good"] is None
    assert sum(reason == "readable.record" for reason in reasons.values()) >= 4
    assert summary.samples["web"] == len(reasons)


def test_a_shard_that_is_cut_off(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", encoded(textured(n)) if kind == "png" else b"a view of it")
               for n in range(4) for kind in ("png", "txt")]  # fmt: skip
    path = tar_of(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    summary = curate(shards(path, max_unreadable=1.0), tmp_path / "out")
    assert 0 < summary.kept["web"] < 4
    assert all(row["reason"] is None or row["detail"] for row in table_of(tmp_path / "out"))


def test_a_full_disk_is_one_error_and_a_rerun_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [(f"n{n}", encoded(textured(n)), f"a view of stone {n}") for n in range(6)]
    recipe = recipe_of({"web": write_samples(tmp_path / "in", samples)}, samples_per_unit=2)
    written: list[Path] = []
    real = parts_module.atomic_file

    def full(path: Path) -> object:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        return real(path)

    monkeypatch.setattr(parts_module, "atomic_file", full)
    with pytest.raises(CurateError, match="cannot be written: No space left on device"):
        curate(recipe, tmp_path / "out")
    monkeypatch.undo()
    summary = curate(recipe, tmp_path / "out")
    assert summary.kept == {"web": 6}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of processes")
@pytest.mark.parametrize("size", [2_000, 40_000, 200_000])
def test_files_that_may_not_grow_are_one_error_and_a_rerun_finishes(
    size: int, tmp_path: Path
) -> None:
    """As on a full disk, whatever writes."""
    import resource

    samples = [(f"n{n}", encoded(textured(n)), f"a view of stone {n}") for n in range(2)]
    recipe = recipe_of({"web": write_samples(tmp_path / "in", samples)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(CurateError, match=r"File too large|written"):
            curate(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert curate(recipe, tmp_path / "out").kept == {"web": 2}
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_damaged_part_is_one_error(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "in", [("one", encoded(textured(1)), "a fine view")])
    curate(recipe_of({"web": path}), tmp_path / "out")
    part = next((tmp_path / "out" / "work").glob("web-*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CurateError, match="is damaged, remove it and run again"):
        curate(recipe_of({"web": path}), tmp_path / "out")


def test_animations_are_measured_as_such(tmp_path: Path) -> None:
    frames = [textured(n) for n in range(3)]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    path = write_samples(tmp_path / "in", [("moving", animation, "a moving view")])
    curate(recipe_of({"web": path}), tmp_path / "out")
    assert table_of(tmp_path / "out")[0]["images"][0]["frames"] == 3


def test_text_that_utf8_cannot_write(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "in", [("one", encoded(textured(1)), "a fine view")])
    half = path.read_text().replace('"one"', r'"\ud800"')
    (tmp_path / "in" / "two.img").write_bytes(encoded(textured(2)))
    path.write_text(half.replace("one.img", "two.img") + half.replace("fine", r"\udc00"))
    curate(recipe_of({"web": path}), tmp_path / "out")
    first, second = table_of(tmp_path / "out")
    assert (first["id"], first["reason"]) == ("?", None)
    assert second["reason"] == "readable.record"
    assert "half a character" in second["detail"]
    assert ShardData(path=str(tmp_path / "out" / "shards")).build()[0].id == "?"


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_names_of_files_that_are_not_text(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for ending, content in ((b"png", encoded(textured(1))), (b"txt", b"a fine view")):
        (folder / os.fsdecode(b"\xff." + ending)).write_bytes(content)
    recipe = recipe_from_table({"sources": [{"kind": "captions", "path": str(folder)}]})
    curate(recipe, tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"?": None}


def test_a_shard_with_a_million_empty_members(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "empty.tar"
    with path.open("wb") as file:
        for _ in range(1000):
            file.write(header * 1000)
    members = [("good.png", encoded(textured(1))), ("good.txt", b"a view of one")]
    tar_of(tmp_path / "good.tar", members)
    begin = time.process_time()
    summary = curate(shards(tmp_path), tmp_path / "out")
    assert time.process_time() - begin < 10
    assert summary.kept == {"web": 1}
    assert any("more than 10,000 empty files" in text for text in summary.damage)


def test_a_hashed_image_beside_an_unreadable_one_is_not_shown(tmp_path: Path) -> None:
    bad = textured(1)
    path = write_samples(tmp_path / "in", [("pair", encoded(bad), "what is it")], role="input")
    record = json.loads(path.read_text())
    record["image"] = ["pair.img", "gone.img"]
    path.write_text(json.dumps(record) + "\n")
    (tmp_path / "hashes.txt").write_text(perceptual_hash(bad)[0].hex() + "\n")
    known = {"known": {"hashes": str(tmp_path / "hashes.txt")}}
    curate(recipe_of({"web": path}, stages=known, max_unreadable=1.0), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"pair": "known.hash"}
    assert "data:image" not in (tmp_path / "out" / "report.html").read_text()
