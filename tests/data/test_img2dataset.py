"""Captions that are only in the tables of img2dataset, and images that stand in records as text."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from neounify.data.configs import read_data
from neounify.data.formats import recognise
from neounify.data.sample import DataError
from neounify.data.sources import FileSource
from support.own_data import png, write_lines, write_tar

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [
    {"key": "000000000", "caption": "a wall", "status": "success"},
    {"key": "000000001", "caption": None, "status": "success"},
    {"key": "000000002", "caption": "a gone wall", "status": "failed_to_download"},
]


def build(kind: str, path: Path) -> FileSource:
    source = read_data({"kind": kind, "path": str(path)}).build()
    assert isinstance(source, FileSource)
    return source


def table(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("metadata", [None, {"width": 32}, {"caption": None}])
def test_captions_beside_a_shard(metadata: Any, tmp_path: Path) -> None:
    members = {}
    for number in (0, 1):
        members[f"{number:09d}.jpg"] = png(32, 32)
        if metadata is not None:
            members[f"{number:09d}.json"] = json.dumps(metadata).encode()
    write_tar(tmp_path / "00000.tar", members)
    table(tmp_path / "00000.parquet")
    source = build("shards", tmp_path)
    assert source.size == 2
    assert (source[0].task, source[0].text("user")) == ("t2i", "a wall")
    with pytest.raises(DataError, match="caption"):
        source[1]


def test_a_text_of_its_own_comes_first(tmp_path: Path) -> None:
    members = {"000000000.jpg": png(32, 32), "000000000.txt": b"mine"}
    members |= {"000000002.jpg": png(32, 32), "000000002.json": b'{"caption": "of the json"}'}
    write_tar(tmp_path / "00000.tar", members)
    table(tmp_path / "00000.parquet")
    source = build("shards", tmp_path)
    assert [source[n].text("user") for n in (0, 1)] == ["mine", "of the json"]


def test_a_damaged_table_beside_a_shard_is_named(tmp_path: Path) -> None:
    members = {"a.jpg": png(32, 32), "b.jpg": png(32, 32), "b.txt": b"a wall"}
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 nothing")
    source = build("shards", tmp_path)
    assert any("00000.parquet: a damaged" in text for text in source.damage)
    assert source[1].text("user") == "a wall"


def test_captions_beside_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "00000"
    folder.mkdir()
    for number in (0, 1):
        (folder / f"{number:09d}.jpg").write_bytes(png(32, 32))
    (folder / "000000001.txt").write_text("mine")
    table(tmp_path / "00000.parquet")
    assert recognise(tmp_path).kind == "captions"
    source = build("captions", tmp_path)
    assert [source[n].text("user") for n in (0, 1)] == ["a wall", "mine"]
    shutil.rmtree(folder)
    assert recognise(tmp_path).kind == "parquet"


URL = "data:image/png;base64," + base64.b64encode(png(32, 48)).decode()


@pytest.mark.parametrize("kind", ["jsonl", "shards"])
def test_images_as_text_in_a_record(kind: str, tmp_path: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": URL}}
    talk = [
        {"role": "user", "content": [part, {"type": "text", "text": "Which colour?"}]},
        {"role": "assistant", "content": "Red."},
    ]
    listed = {"conversations": [{"from": "human", "value": "a wall"}], "image": [URL]}
    listed["conversations"].append({"from": "gpt", "value": "<image>"})  # type: ignore[attr-defined]
    records = [{"messages": talk}, listed]
    if kind == "jsonl":
        path = write_lines(tmp_path / "a.jsonl", records)
    else:
        path = tmp_path / "a.tar"
        write_tar(path, {f"{n}.json": json.dumps(r).encode() for n, r in enumerate(records)})
    source = build(kind, path)
    assert [source[n].task for n in (0, 1)] == ["vqa", "t2i"]
    assert all(source[n].images[0].pixels().shape[:2] in ((32, 48), (48, 32)) for n in (0, 1))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:text/plain;base64,AAAA", "no image in base64"),
        ("data:image/png,AAAA", "no image in base64"),
        ("data:image/png;base64", "no image in base64"),
        ("data:image/png;base64,§", "not base64"),
        ("data:image/png;base64,AAAA", "the file in the record"),
        ("https://example.org/a.png", "is an address"),
    ],
)
def test_odd_addresses_are_refused(url: str, words: str, tmp_path: Path) -> None:
    record = {"file_name": url, "text": "a wall"}
    source = build("jsonl", write_lines(tmp_path / "a.jsonl", [record]))
    with pytest.raises(DataError, match=words):
        source[0]
