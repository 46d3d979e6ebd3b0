"""Kinds of files: arrays, tables, folders with captions, Parquet; what each gives and refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neounify.data import arrays, parquet
from neounify.data.arrays import JsonSource
from neounify.data.configs import read_data
from neounify.data.folders import CaptionFolder
from neounify.data.formats import recognise
from neounify.data.parquet import ParquetSource
from neounify.data.sample import DataError
from neounify.data.sources import FileSource, JsonlSource, Mixture
from neounify.data.tables import CsvSource
from support.own_data import paint_record, png, text_record, write_lines, write_tar

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def folder_with(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def table(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


# --- one file of each kind, and the same sample of all --------------------------------------------

RECORD = {"file_name": "a.png", "text": "a wall"}


def _jsonl(folder: Path) -> Path:
    write_lines(folder / "metadata.jsonl", [RECORD])
    return folder


def _json(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps([paint_record("a wall", "a.png")], indent=1))
    return folder / "a.json"


def _csv(folder: Path) -> Path:
    (folder / "metadata.csv").write_text("file_name,text\na.png,a wall\n")
    return folder / "metadata.csv"


def _captions(folder: Path) -> Path:
    (folder / "a.txt").write_text("a wall\n")
    return folder


def _parquet(folder: Path) -> Path:
    image = {"bytes": (folder / "a.png").read_bytes(), "path": "z.png"}
    return table(folder / "a.parquet", [{"image": image, "text": "a wall"}])


def _shards(folder: Path) -> Path:
    members = {"a.png": (folder / "a.png").read_bytes(), "a.txt": b"a wall"}
    write_tar(folder / "a.tar", members)
    table(folder / "a.parquet", [{"key": "a", "caption": "a wall", "status": "success"}])
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "captions": _captions,
    "parquet": _parquet,
    "shards": _shards,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_recognised_and_gives_the_sample(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(png(64, 32))
    path = KINDS[kind](tmp_path)
    assert recognise(path).kind == kind
    source = read_data({"kind": kind, "path": str(path)}).build()
    assert isinstance(source, FileSource)
    assert (source.size, source.damage) == (1, [])
    sample = source[0]
    assert (sample.task, sample.text("user")) == ("t2i", "a wall")
    assert sample.images[0].pixels().shape == (32, 64, 3)
    assert sample.id
    again = pickle.loads(pickle.dumps(source))
    assert again[0].id == sample.id
    assert np.array_equal(again[0].images[0].pixels(), sample.images[0].pixels())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_the_wrong_kind_is_one_error(tmp_path: Path, kind: str, other: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = KINDS[other](tmp_path)
    if kind == other:
        return
    if kind == "parquet" and other == "shards":
        path /= "a.tar"
    with pytest.raises(DataError) as raised:
        read_data({"kind": kind, "path": str(path)}).build()
    assert "\n" not in str(raised.value)
    assert f'kind = "{other}"' in str(raised.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "captions", "parquet"])
def test_images_may_lie_in_another_folder(tmp_path: Path, kind: str) -> None:
    folder_with(tmp_path, {"data/a.png": png(), "images/a.png": png(96, 32), "secret.png": png()})
    path = KINDS[kind](tmp_path / "data")
    if kind == "parquet":
        table(path, [{"image": "a.png", "text": "a wall"}, {"image": "../secret.png", "text": "b"}])
    (tmp_path / "data/a.png").unlink()
    images = {"images": str(tmp_path / "images")}
    source = read_data({"kind": kind, "path": str(path), **images}).build()
    assert source[0].images[0].pixels().shape == (32, 96, 3)
    if kind == "parquet":
        with pytest.raises(DataError, match="lies outside the data folder"):
            source[1]
    with pytest.raises(DataError, match=r"folder of images .* is not there"):
        read_data({"kind": kind, "path": str(path), "images": str(tmp_path / "none")}).build()


# --- arrays ---------------------------------------------------------------------------------------


def spans(content: bytes, folder: Path) -> tuple[list[Any], list[str]]:
    (folder / "a.json").write_bytes(content)
    source = JsonSource(folder / "a.json")
    return [source.record(n) for n in range(source.size)], source.damage


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 4096])
def test_records_of_an_array_are_those_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
    tricky = ['"', "\\", '\\"', "[{", "}]", "\\\\", ",", "é", "\n", '\\\\"}]', ""]
    records = [{"a": text, text: [{"b": [text, {}]}, [], [[]]]} for text in tricky]
    for indent in (None, 2):
        content = json.dumps(records, indent=indent, ensure_ascii=False).encode()
        assert spans(content, tmp_path) == (records, [])
    assert spans(b'\xef\xbb\xbf \n[ {} , {"a": 1}\n]\n', tmp_path) == ([{}, {"a": 1}], [])


@pytest.mark.parametrize("chunk", [1, 5, 4096])
@pytest.mark.parametrize(
    ("content", "records", "words"),
    [
        (b'[{"a": 1}, {"a": 2', 1, "cut off after record 1"),
        (b'[{"a": 1}, {"a": "2}]', 1, "cut off after record 1"),
        (b'[{"a": 1}, 7, {"a": 2}]', 1, "'7' at byte 11, after record 1"),
        (b'[{"a": 1}, "x", {"a": 2}]', 1, "after record 1, where only records"),
        (b'[{"a": 1}] [{"a": 2}]', 1, "after the end of the array"),
        (b'[{"a": 1}]]', 1, "after the end of the array"),
        (b'[{"a": 1}]}', 1, "after the end of the array"),
    ],
)
def test_a_damaged_array_gives_the_records_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    content: bytes,
    records: int,
    words: str,
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
    read, damage = spans(content, tmp_path)
    assert (len(read), len(damage)) == (records, 1)
    assert words in damage[0]


def test_arrays_without_records_and_deep_ones(tmp_path: Path) -> None:
    for content in (b"[]", b"[1, 2]", b"[" * 100_000):
        with pytest.raises(DataError, match="holds no samples"):
            spans(content, tmp_path)
    (tmp_path / "b.json").write_bytes(b"[" + b"[" * 100_000 + b"]" * 100_001)
    source = JsonSource(tmp_path / "b.json")
    with pytest.raises(DataError, match=r"b\.json, record 1: not JSON"):
        source[0]
    (tmp_path / "c.json").write_text('{"a": 1,\n "b": 2}')
    with pytest.raises(DataError, match="holds one JSON object"):
        JsonSource(tmp_path / "c.json")


def test_a_large_array_is_not_kept_in_memory(tmp_path: Path) -> None:
    line = json.dumps(text_record("q" * 2000)).encode()
    with (tmp_path / "a.json").open("wb") as file:
        file.write(b"[" + b",\n".join([line] * 20_000) + b"]")
    source = JsonSource(tmp_path / "a.json")
    assert source.size == 20_000
    assert len(pickle.dumps(source)) < 1_000_000 < (tmp_path / "a.json").stat().st_size / 40
    assert source[19_999].id == "a-20000"


# --- tables ---------------------------------------------------------------------------------------


def test_rows_of_a_table_are_those_of_csv(tmp_path: Path) -> None:
    rows = [["a.png", 'a "red", wall'], ["b.png", "two\nlines\r\n"], ["c.png", "é ☃"]]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["file_name", "text"], *rows])
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    source = CsvSource(tmp_path / "m.csv")
    assert [list(source.record(n).values()) for n in range(3)] == rows
    assert [source.location(n) for n in (0, 2)] == ["m.csv, line 2", "m.csv, line 6"]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t").writerows([["file_name", "text"], *rows])
    (tmp_path / "m.tsv").write_bytes(text.getvalue().encode())
    assert [list(CsvSource(tmp_path / "m.tsv").record(n).values()) for n in range(3)] == rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"file_name,text\na.png,b,c\n", r"m\.csv, line 2: 3 values, but 2 columns"),
        (b"file_name,text\na.png,caf\xe9\n", r"line 2: not UTF-8 text"),
        (b"file_name,text,text\na.png,b,c\n", "the column 'text' twice"),
        (b"file_name,\na.png,b\n", "a column without a name"),
        (b"file_name,text\n", "holds no samples"),
        (b"file_name,text\n" + b'a.png,"' + b"x" * 200_000, "field larger than field limit"),
        (b"\xff,text\na,b\n", "not UTF-8"),
        (b",".join(b"%d" % n for n in range(1001)) + b"\n", "1,001 columns"),
    ],
)
def test_damaged_tables(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        CsvSource(tmp_path / "m.csv")[0]


def test_rows_before_a_fault_of_a_table_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "m.csv").write_text('file_name,text\na.png,wall\na.png,"b" c\na.png,d\n')
    source = CsvSource(tmp_path / "m.csv")
    assert (source.size, source[0].text("user")) == (1, "wall")
    assert "m.csv, line 3: " in source.damage[0]


# --- folders with captions ------------------------------------------------------------------------


def test_captions_of_a_folder(tmp_path: Path) -> None:
    folder_with(
        tmp_path,
        {
            "a.png": png(),
            "a.TXT": "\ufeff a wall ",
            "10_cat/b.JPG": png(),
            "10_cat/b.caption": "a cat",
            "c.png": png(),
            "c.json": json.dumps({"caption": "a dog", "width": 3}),
            "d.png": png(),
            "e.txt": "no image",
            "f.png": png(),
            "f.jpg": png(),
            "f.txt": "which?",
            "g.png": png(),
            "g.txt": "one",
            "g.caption": "two",
            "h.png": png(),
            "h.txt": b"caf\xe9",
            "i.png": png(),
            "i.txt": " \n",
            ".hidden/j.png": png(),
            ".hidden/j.txt": "x",
            "k.png": b"",
            "k.txt": "x",
        },
    )
    source = CaptionFolder(tmp_path)
    texts: dict[str, str] = {}
    for n in range(source.size):
        try:
            texts[source.location(n)] = source[n].text("user")
        except DataError as error:
            texts[source.location(n)] = f"! {error}"
    assert {name: text for name, text in texts.items() if not text.startswith("!")} == {
        "a.png": "a wall",
        "10_cat/b.JPG": "a cat",
        "c.png": "a dog",
    }
    for name, words in (
        ("d.png", "no caption"),
        ("f.png", "but for the ending"),
        ("f.jpg", "but for the ending"),
        ("g.png", "two captions"),
        ("h.png", "not UTF-8 text"),
        ("i.png", "caption is empty"),
        ("k.png", "k.png"),
    ):
        assert words in texts[name]
    assert source.damage == [f'{tmp_path.name}: 1 texts without an image or clip: "e.txt"']
    assert source.rules.unread == {"width"}


def test_links_and_pipes_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    folder_with(tmp_path, {"secret.png": png(), "secret.txt": "x", "data/a.txt": "x"})
    data = tmp_path / "data"
    (data / "a.png").symlink_to(tmp_path / "secret.png")
    (data / "b.png").write_bytes(png())
    (data / "b.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(data / "c.png")
    (data / "c.txt").write_text("x")
    (data / "loop").symlink_to(data)
    source = CaptionFolder(data)
    assert source.size == 3
    for n, words in ((0, "lies outside"), (1, "lies outside"), (2, "not a file")):
        with pytest.raises(DataError, match=words):
            source[n]


# --- Parquet --------------------------------------------------------------------------------------


def test_rows_of_every_form_with_images_in_cells(tmp_path: Path) -> None:
    image = {"bytes": png(64, 32), "path": "dir/x.png"}
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    ask = table(tmp_path / "ask.parquet", [{"messages": chat, "images": [image]}])
    sample = ParquetSource(ask)[0]
    assert (sample.task, sample.turns[0].value) == ("vqa", "<image>?")
    assert sample.images[0].pixels().shape == (32, 64, 3)
    rows: list[dict[str, Any]] = [
        {"key": "0", "jpg": png(96, 32), "caption": "a wall", "url": "u", "status": "success"},
        {"key": "1", "jpg": None, "caption": "b", "url": "u", "status": "failed_to_download"},
    ]
    source = ParquetSource(table(tmp_path / "img2dataset.parquet", rows))
    assert (source[0].id, source[0].images[0].pixels().shape) == ("0", (32, 96, 3))
    with pytest.raises(
        DataError, match=r"row 2: there is no image or clip .status 'failed_to_download'"
    ):
        source[1]
    with pytest.raises(DataError, match="the file in the record"):
        ParquetSource(table(tmp_path / "c.parquet", [{"image": b"no", "text": "x"}]))[0]


def test_row_groups_are_read_once_while_a_mixture_draws_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"query": f"{n}?", "response": "yes", "id": str(n)} for n in range(60)]
    for name in ("a", "b"):
        table(tmp_path / f"{name}.parquet", rows, row_group_size=7)
    source = ParquetSource(tmp_path)
    assert source.size == 120
    assert sum(source.groups or ()) == 120
    assert source.location(119) == "b.parquet, row 60"
    read: list[int] = []
    original = ParquetSource._read

    def counting(self: ParquetSource, number: int) -> Any:
        read.append(number)
        return original(self, number)

    monkeypatch.setattr(ParquetSource, "_read", counting)
    mixture = Mixture([(source, 1.0)], 3)
    epoch = [mixture.describe(n)[1] for n in range(120)]
    assert sorted(epoch) == list(range(120))
    assert epoch != [mixture.describe(n)[1] for n in range(120, 240)]
    assert [mixture[n].id for n in range(120)] == [str(n % 60) for n in epoch]
    assert len(read) == len(source.groups or ())


def test_damaged_and_hostile_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = table(tmp_path / "a.parquet", [{"query": "a", "response": "b"}])
    content = good.read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-20] + b"\xff" * 16 + content[-4:])
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    deep: Any = "x"
    for _ in range(20):
        deep = [deep]
    table(tmp_path / "d.parquet", [{"messages": deep}])
    source = ParquetSource(tmp_path)
    assert source.size == 1
    assert [text.partition(":")[0] for text in source.damage] == [f"{n}.parquet" for n in "bcd"]
    assert "nested more than 8 deep" in source.damage[2]
    assert all("\n" not in text and len(text) < 400 for text in source.damage)
    # A dictionary of one value is small in the file and large in memory.
    bomb = table(tmp_path / "bomb.parquet", [{"query": "a", "response": "b" * 10_000}] * 2000)
    assert bomb.stat().st_size < 10_000
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1_000_000)
    with pytest.raises(DataError, match=r"row 1: row group 1 has [\d,]+ bytes in memory"):
        ParquetSource(bomb)[0]


def test_without_pyarrow_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "a.parquet", [{"query": "a", "response": "b"}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"Parquet tables need the extra 'parquet'.*pip install"):
        ParquetSource(path)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_data_errors_alone(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(7)
    (tmp_path / "a.png").write_bytes(png())
    path = KINDS[kind](tmp_path)
    endings = {"captions": "a.txt", "shards": "a.tar", "jsonl": "metadata.jsonl"}
    file = tmp_path / endings.get(kind, path.name)
    content = file.read_bytes()
    refusals: list[str] = []
    for _ in range(80):
        damaged = bytearray(content)
        for position in rng.integers(0, len(damaged), rng.integers(1, 6)):
            damaged[position] = rng.integers(0, 256)
        del damaged[rng.integers(len(damaged) // 2, 2 * len(damaged)) :]
        file.write_bytes(damaged)
        try:
            source = read_data({"kind": kind, "path": str(path)}).build()
            for number in range(source.size or 0):
                assert source[number].task
        except DataError as error:
            refusals.append(str(error))
    assert refusals
    assert all("\n" not in text and len(text) < 1000 for text in refusals)


def test_a_folder_of_json_lines_may_hold_images_and_other_files(tmp_path: Path) -> None:
    folder_with(tmp_path, {"x/a.png": png(), "x/notes.md": "x"})
    write_lines(tmp_path / "x" / "metadata.jsonl", [RECORD])
    assert recognise(tmp_path).kind == "jsonl"
    assert JsonlSource(tmp_path)[0].task == "t2i"
