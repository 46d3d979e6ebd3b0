"""Every kind of data that holds files is curated into shards that the trainer reads."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from neounify.curate import curate, recipe_from_table
from neounify.data.shards import ShardData
from support.curation import encoded, textured

TEXTS = [f"a view of stone {n}" for n in range(3)]
CONTENTS = [encoded(textured(n)) for n in range(3)]
RECORDS = [
    {
        "conversations": [
            {"from": "human", "value": text},
            {"from": "gpt", "value": "<image>"},
        ],
        "image": f"{n}.png",
    }
    for n, text in enumerate(TEXTS)
]


def images(folder: Path) -> Path:
    folder.mkdir()
    for n, content in enumerate(CONTENTS):
        (folder / f"{n}.png").write_bytes(content)
    return folder


def json_lines(folder: Path) -> Path:
    path = images(folder) / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def json_array(folder: Path) -> Path:
    path = images(folder) / "a.json"
    path.write_text(json.dumps(RECORDS))
    return path


def table(folder: Path) -> Path:
    path = images(folder) / "a.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        rows.writerows((f"{n}.png", text) for n, text in enumerate(TEXTS))
    return path


def caption_folder(folder: Path) -> Path:
    images(folder)
    for n, text in enumerate(TEXTS):
        (folder / f"{n}.txt").write_text(text)
    return folder


def tar_shards(folder: Path) -> Path:
    folder.mkdir()
    for number, (content, text) in enumerate(zip(CONTENTS, TEXTS, strict=True)):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for name, data in ((f"{number}.png", content), (f"{number}.txt", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def parquet(folder: Path) -> Path:
    folder.mkdir()
    cells = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(CONTENTS)]
    pa.parquet.write_table(pa.table({"image": cells, "text": TEXTS}), folder / "a.parquet")
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "jsonl": json_lines,
    "json": json_array,
    "csv": table,
    "captions": caption_folder,
    "shards": tar_shards,
    "parquet": parquet,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_data_is_curated(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path / "in")
    source: dict[str, Any] = {"name": "web", "kind": kind, "path": str(path)}
    summary = curate(recipe_from_table({"sources": [source]}), tmp_path / "out")
    assert summary.kept == {"web": 3}
    kept = ShardData(path=str(tmp_path / "out" / "shards")).build()
    assert [kept[n].text("user") for n in range(3)] == TEXTS
    for shard in (tmp_path / "out" / "shards").glob("*.tar"):
        with tarfile.open(shard) as archive:
            stored = [
                archive.extractfile(m).read()  # type: ignore[union-attr]
                for m in archive
                if m.name.endswith(".png")
            ]
        assert all(content in CONTENTS for content in stored)
