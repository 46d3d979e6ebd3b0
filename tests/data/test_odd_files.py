"""Odd and hostile data files: one line that says what is wrong, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from neounify.config.presets import SCENES
from neounify.data import media
from neounify.data.encode import Encoder
from neounify.data.loader import MAX_MESSAGE_CHARS, LoaderConfig, load_packs, skipped_sample
from neounify.data.sample import DataError
from neounify.data.shards import ShardData, ShardSource
from neounify.data.sources import JsonlSource, Mixture
from neounify.text import byte_tokenizer
from neounify.train.log import Log
from support.own_data import paint_record, png, text_record, write_lines, write_tar
from support.samples import build_mixture

BAD_NAME = b"caf\xe9.png".decode("utf-8", "surrogateescape")
"""A name in Latin-1, as Python gives it back."""


def test_names_that_are_not_utf8_are_no_reason_to_stop(tmp_path: Path) -> None:
    members = {BAD_NAME: b"no image", BAD_NAME.replace("png", "txt"): b"x"}
    good = {"a.png": png(64, 64), "a.txt": b"noise"}
    mixture = Mixture([(ShardSource([write_tar(tmp_path / "d.tar", members | good)]), 1.0)], 0)
    encoder = Encoder(config=SCENES, tokenizer=byte_tokenizer())
    loaded = next(load_packs(mixture, encoder, LoaderConfig(tokens_per_pack=100, workers=0)))
    messages = [skipped.message for skipped in loaded.skipped]
    assert messages
    log = Log(tmp_path / "run", Console(file=io.StringIO()), tensorboard=False)
    log.damaged([*messages, f"raw {BAD_NAME}"])
    listed = (tmp_path / "run" / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert "not an image" in listed[0]


def test_reports_on_samples_are_one_short_printable_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", [text_record("x")])
    mixture = Mixture([(JsonlSource(tmp_path / "d.jsonl"), 1.0)], 0)
    error = DataError("the image \x1b[31mred\n" + "a" * 10_000_000)
    message = skipped_sample(mixture, 0, 0, error).message
    assert message.startswith("d.jsonl, line 1: the image")
    assert len(message) == MAX_MESSAGE_CHARS
    assert message.isprintable()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (paint_record("x", "data:image/png;base64," + "A" * 300_001), "not base64"),
        (text_record("x", image=["a.png"] * 20_000), "20,000 images"),
        (paint_record("x", "a\0.png"), "cannot be found"),
        (paint_record("x", "circle.png"), "circle.png"),
        (text_record("x", task=["t2i" * 100_000]), '"task"'),
        (text_record("x", task="t2i" * 100_000), "task"),
    ],
)
def test_records_that_cannot_be_read_are_named_shortly(
    tmp_path: Path, record: dict[str, Any], said: str
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "circle.png").symlink_to("circle.png")
    source = JsonlSource(write_lines(tmp_path / "d.jsonl", [record]))
    began = time.process_time()
    with pytest.raises(DataError, match=said) as raised:
        source[0]
    assert len(str(raised.value)) < 500
    assert time.process_time() - began < 2


def test_images_of_one_sample_share_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png(32, 32))
    source = JsonlSource(write_lines(tmp_path / "d.jsonl", [text_record("x", image=["a.png"] * 3)]))
    assert len(source[0].images) == 3
    monkeypatch.setattr(media, "MAX_SAMPLE_PIXELS", 2 * 32 * 32)
    with pytest.raises(DataError, match=r"more than 2,048 pixels together"):
        source[0]


def test_text_in_another_encoding_is_said_to_be(tmp_path: Path) -> None:
    line = json.dumps(text_record("café"), ensure_ascii=False)
    (tmp_path / "d.jsonl").write_bytes(line.encode("latin-1") + b"\n" + line.encode("utf-8-sig"))
    source = JsonlSource(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match=r"line 1: not UTF-8 text \(byte 0xe9 .*iconv"):
        source[0]
    assert "café" in source[1].text()
    shard = write_tar(tmp_path / "d.tar", {"a.png": png(), "a.txt": "café".encode("latin-1")})
    with pytest.raises(DataError, match="the caption is not UTF-8"):
        ShardSource([shard])[0]


def test_an_id_of_null_is_none(tmp_path: Path) -> None:
    records = [text_record("x", id=None), text_record("x", id="n" * 10_000)]
    source = JsonlSource(write_lines(tmp_path / "d.jsonl", records))
    assert source[0].id == "d-1"
    assert len(source[1].id) == 200


def test_folders_give_their_visible_files_only(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [text_record("x")])
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\x16\7" * 30)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write_lines(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", [text_record("x")])
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would wait for a writer
    assert JsonlSource(tmp_path).files == [tmp_path / "a.jsonl"]
    write_tar(tmp_path / "a.TAR", {"a.png": png(), "a.txt": b"x"})
    write_tar(tmp_path / ".b.tar", {"a.png": png(), "a.txt": b"x"})
    assert build_mixture([ShardData(path=str(tmp_path))], 0).sources[0].size == 1
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        JsonlSource(tmp_path)


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match="git lfs pull"):
        JsonlSource(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("{000..010}.tar", "braces"), ("a**b/x.tar", r"\*\*"), ("n" * 300 + "*", "n")],
)
def test_patterns_that_name_no_shard(tmp_path: Path, pattern: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        build_mixture([ShardData(path=str(tmp_path / pattern))], 0)


def test_the_image_of_the_records_name_is_used_not_its_companion(tmp_path: Path) -> None:
    members = {"a.depth.png": png(96, 96), "a.png": png(64, 64), "a.txt": b"noise"}
    sample = ShardSource([write_tar(tmp_path / "d.tar", members)])[0]
    assert sample.images[0].pixels().shape == (64, 64, 3)


def test_a_large_record_in_a_shard_is_not_parsed(tmp_path: Path) -> None:
    members = {"a.json": b"[" + b"1," * 2**23 + b"1]", "a.png": png()}
    with pytest.raises(DataError, match=r"json has \d+ bytes"):
        ShardSource([write_tar(tmp_path / "d.tar", members)])[0]


def _header(fields: dict[str, str] | None = None, size: bytes | None = None) -> bytes:
    """A tar with one empty file whose header is damaged."""
    info = tarfile.TarInfo("a.png")
    info.pax_headers = fields or {}
    content = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    if size is not None:
        content[124:136] = size
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content) + b"\0" * 1024


@pytest.mark.parametrize(
    "content",
    [
        _header(size=b"\x80" + b"\xff" * 11),
        _header(size=b"\xff" * 12),
        _header({"GNU.sparse.map": "1,a", "GNU.sparse.size": "1"}),
        _header({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}),
    ],
)
def test_damaged_headers_of_a_shard_are_data_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"d\.tar"):
        ShardSource([tmp_path / "d.tar"])[0]
