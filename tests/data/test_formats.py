"""Forms of other tools: recognised at once, in one line that says what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from neounify.data.configs import read_data
from neounify.data.records import RecordRules
from neounify.data.sample import DataError
from neounify.data.shards import ShardSource
from neounify.data.sources import JsonlData, JsonlSource
from support.own_data import paint_record, png, text_record, write_lines, write_tar
from support.samples import build_mixture

ONE = text_record("q")
LINE = json.dumps(ONE) + "\n"


def message(kind: str, path: Path | str) -> str:
    with pytest.raises(DataError) as raised:
        build_mixture([read_data({"kind": kind, "path": str(path)})], 0)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps([ONE, ONE]), "one JSON array"),
        (json.dumps([ONE, ONE], indent=1), 'kind = "json"'),
        ("\ufeff" + json.dumps([ONE]), "one JSON array"),
        (json.dumps(ONE, indent=2), "over several lines"),
        (LINE.encode("utf-16"), "iconv -f UTF-16"),
        (LINE.encode("utf-16-le"), "iconv -f UTF-16"),
        (gzip.compress(LINE.encode(), mtime=0), "gunzip"),
        (bz2.compress(LINE.encode()), "bunzip2"),
        (lzma.compress(LINE.encode()), "unxz"),
        (b"\x28\xb5\x2f\xfd....", "unzstd"),
        (b"PK\x03\x04....", "unpack"),
        (b"PAR1....PAR1", 'kind = "parquet"'),
        (b"ARROW1\0\0....", "Arrow"),
    ],
)
def test_files_that_are_no_json_lines(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert words in message("jsonl", path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (LINE * 2).replace("\n", "\r\n").encode())
    assert [JsonlSource(path)[n].task for n in range(2)] == ["text", "text"]


def test_tables_and_files_of_the_other_kind(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("image,prompt\na.png,a wall\n")
    assert "CSV" in message("jsonl", tmp_path / "metadata.csv")
    write_tar(tmp_path / "x.tar", {"1.png": png(), "1.txt": b"x"})
    assert 'kind = "shards"' in message("jsonl", tmp_path / "x.tar")
    (tmp_path / "x.jsonl").write_text(LINE)
    assert 'kind = "jsonl"' in message("shards", tmp_path / "x.jsonl")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    assert "gunzip" in message("shards", tmp_path / "x.tar.gz")
    assert "is not there" in message("shards", tmp_path / "none-*.tar")
    assert "neither a file nor a folder" in message("jsonl", "/dev/null")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.png": png(), "a.txt": b"a wall"}, 'kind = "captions"'),
        ({"10_cat/a.JPG": png(), "10_cat/a.caption": b"a cat"}, 'kind = "captions"'),
        ({"a.png": png()}, "neither records that name them nor texts"),
        ({"x.tar": b""}, 'kind = "shards"'),
        ({"x.parquet": b""}, 'kind = "parquet"'),
        ({"x.jsonl.gz": b""}, "gunzip"),
        ({"llava.json": b"[]"}, 'kind = "json"'),
        ({}, "no files"),
    ],
)
def test_folders_without_json_lines(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert words in message("jsonl", tmp_path)


def test_a_folder_of_captioned_images_packed_as_advised_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "data.tar", {"./a.png": png(), "./a.txt": b"a wall", "./b.png": png()})
    source = ShardSource([tmp_path / "data.tar"])
    assert source[0].text("user") == "a wall"


CHAT = [{"role": "user", "content": "<image>Colour?"}, {"role": "assistant", "content": "Red."}]


@pytest.mark.parametrize(
    ("record", "words"),
    [({"text": "words"}, 'it has "text"'), ({}, "no fields"), ({"url": "u"}, "known form")],
)
def test_records_of_no_known_form(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    source = JsonlSource(write_lines(tmp_path / "x.jsonl", [record]))
    with pytest.raises(DataError, match=words) as raised:
        source[0]
    assert '"conversations": [{"from": "human"' in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"imgae": "a.png"}, 'unknown field "imgae"; did you mean "image"'),
        ({"images": ["a.png"], "image": "b.png"}, 'both "image" and "images"'),
        ({"audios": ["a.mp3"]}, '"audios": only text, images and clips'),
        ({"tools": "[]"}, 'unknown field "tools"'),
        ({"width": 64}, 'unknown field "width"; known are'),
        ({"system": 3}, '"system" is int'),
        ({"image": "https://example.org/a.png"}, "download the image"),
        ({"image": ""}, "none of them empty"),
        ({"image": "sub\\a.png"}, "paths are written with /"),
    ],
)
def test_fields_that_would_be_lost_are_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    source = JsonlSource(write_lines(tmp_path / "x.jsonl", [{**ONE, **fields}]))
    with pytest.raises(DataError, match=words):
        source[0]


def test_fields_of_a_turn_are_checked_too(tmp_path: Path) -> None:
    record = text_record("q")
    record["conversations"][1]["weight"] = 0
    path = write_lines(tmp_path / "x.jsonl", [record])
    with pytest.raises(DataError, match='a turn has the unknown field "weight"'):
        JsonlSource(path)[0]
    assert JsonlSource(path, rules=RecordRules(ignored=("weight",)))[0].task == "text"


def test_names_that_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    records = [
        {**ONE, "images": ["a.png"]},
        {**ONE, "system": "Be brief."},
        {**ONE, "system": "Be brief.", "loss": [[False], [True]]},
        {**ONE, "videos": [], "audios": None, "system": ""},
    ]
    source = JsonlSource(write_lines(tmp_path / "x.jsonl", records))
    assert len(source[0].images) == 1
    for n in (1, 2):
        assert [turn.role for turn in source[n].turns] == ["system", "user", "assistant"]
        assert source[n].turns[0].value == "Be brief."
    assert source[3].task == "text"
    twice = [{"from": "system", "value": "a"}, *ONE["conversations"]]
    both = write_lines(tmp_path / "y.jsonl", [{"conversations": twice, "system": "b"}])
    with pytest.raises(DataError, match="a system turn"):
        JsonlSource(both)[0]


def test_fields_that_need_not_be_read_are_named_in_the_recipe(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{**ONE, "source": "web", "width": 3}])
    recipe = JsonlData(path=str(path), ignore=("source", "width"))
    assert build_mixture([recipe], 0)[0].task == "text"


def test_images_of_another_folder(tmp_path: Path) -> None:
    for name in ("data", "images/sub", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for file in ("images/sub/a.png", "secret/b.png"):
        (tmp_path / file).write_bytes(png(32, 32))
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret" / "b.png")
    (tmp_path / "images" / "folder").symlink_to(tmp_path / "secret")
    names = ["sub/a.png", str(tmp_path / "images/sub/a.png"), "sub/../sub/a.png"]
    outside = ["../secret/b.png", str(tmp_path / "secret/b.png"), "link.png", "folder/b.png"]
    path = write_lines(tmp_path / "data/x.jsonl", [paint_record("x", n) for n in names + outside])
    recipe = JsonlData(path=str(path), images=str(tmp_path / "images"))
    (source,) = build_mixture([recipe], 0).sources
    for n in range(len(names)):
        assert source[n].images[0].pixels().shape == (32, 32, 3)
    for n in range(len(names), len(names + outside)):
        with pytest.raises(DataError, match=r"lies outside .*images = FOLDER"):
            source[n]
    gone = JsonlData(path=str(path), images=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"folder of images .* is not there"):
        build_mixture([gone], 0)


META = json.dumps({"caption": "a red wall", "url": "u", "key": "0", "status": "success"}).encode()


@pytest.mark.parametrize(
    "members",
    [
        {"0.jpg": png(), "0.txt": b"a red wall", "0.json": META},
        {"0.jpg": png(), "0.json": META},
        {"0.jpg": png(), "0.caption": b" a red wall\n"},
        {"0.JPG": png(), "0.TXT": b"\xef\xbb\xbfa red wall"},
        {"./x/0.webp": png(), "./x/0.txt": b"a red wall"},
    ],
)
def test_shards_of_img2dataset(tmp_path: Path, members: dict[str, bytes]) -> None:
    source = ShardSource([write_tar(tmp_path / "a.tar", members)])
    assert source.size == 1
    assert (source[0].task, source[0].text("user")) == ("t2i", "a red wall")
    assert len(source[0].images) == 1


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"0.jpg": png(), "0.txt": b" \n"}, "caption is empty"),
        ({"0.jpg": png(), "0.json": b'{"url": "u"}'}, "there is no caption"),
        ({"0.json": META}, "there is no image or clip .status 'success'."),
        ({"0.input.jpg": png(), "0.prompt.txt": b"x"}, 'share the name .* "input.jpg"'),
        (
            {"0.jpg": png(), "0.json": json.dumps({"messages": CHAT}).encode()},
            "1 <image> marks, but 0 images",
        ),
    ],
)
def test_what_is_wrong_in_a_shard_is_said(
    tmp_path: Path, members: dict[str, bytes], words: str
) -> None:
    source = ShardSource([write_tar(tmp_path / "a.tar", members)])
    with pytest.raises(DataError, match=words):
        source[0]


def test_a_record_in_a_shard_names_its_image_in_three_ways(tmp_path: Path) -> None:
    records = {
        "a.json": paint_record("x", "a.0.png"),
        "b.json": paint_record("x", "0.png"),
        "c.json": paint_record("x", "photos/wall.JPG"),
    }
    members = {name: json.dumps(record).encode() for name, record in records.items()}
    members |= {"a.0.png": png(32, 32), "b.0.png": png(64, 32), "photos/wall.jpg": png(96, 32)}
    source = ShardSource([write_tar(tmp_path / "a.tar", members)])
    assert source.size == 3
    assert [source[n].images[0].pixels().shape[1] for n in range(3)] == [32, 64, 96]
    members["c.json"] = json.dumps(paint_record("x", "photos/none.png")).encode()
    source = ShardSource([write_tar(tmp_path / "b.tar", members)])
    with pytest.raises(DataError, match="by its path in the shard"):
        source[2]
