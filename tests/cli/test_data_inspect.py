"""`neounify data inspect`: form, counts, samples as the model sees them, what is skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neounify.config.presets import SCENES
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoder
from neounify.data.preview import preview
from neounify.data.sources import JsonlSource
from neounify.text import byte_tokenizer
from support.own_data import png, write_lines, write_tar

Run = Callable[..., Any]


def records(folder: Path) -> Path:
    (folder / "a.png").write_bytes(png(64, 64))
    chat = [
        {"role": "user", "content": "<image>\nWhich colour?"},
        {"role": "assistant", "content": "Red."},
    ]
    lines = [
        {"messages": chat, "images": ["a.png"]},
        {"file_name": "a.png", "text": "a <b>wall</b>", "width": 3},
        {"messages": chat, "images": ["a.png"], "tools": "x"},
        {"messages": chat, "images": ["gone.png"]},
    ]
    return write_lines(folder / "d.jsonl", lines)


def test_pieces_are_the_tokens_of_the_document(tmp_path: Path) -> None:
    source = JsonlSource(records(tmp_path))
    plain = GuidanceDropout(text=0.0, all=0.0)
    encoder = Encoder(config=SCENES, tokenizer=byte_tokenizer(), dropout=plain)
    (result,) = {id(p): p for p in preview(source, encoder, 100, 2)}.values()
    assert (result.tried, len(result.skipped), dict(result.tasks)) == (4, 2, {"vqa": 1, "t2i": 1})
    asked, painted = result.shown
    for number, shown in enumerate(result.shown):
        encoded = encoder(source[number], np.random.default_rng(0))
        assert shown.tokens == encoded.length
        text = "".join(piece.text for piece in shown.pieces)
        assert text == encoder.tokenizer.decode(encoded.ids, skip_special=False)
    learnt = [piece for piece in asked.pieces if piece.loss]
    assert [piece.text for piece in learnt] == ["Red.<|im_end|>"]
    assert [piece.pixels is not None for piece in painted.pieces if piece.loss] == [True]
    assert asked.with_loss == sum(piece.tokens for piece in learnt)


def test_the_terminal_shows_form_counts_and_samples(run: Run, tmp_path: Path) -> None:
    ran = run("data", "inspect", records(tmp_path), "--page", tmp_path / "p.html")
    for words in (
        "JSON lines",
        'kind = "jsonl"',
        "messages 3, caption 1",
        "4; 4 read, 2 usable",
        "unknown field",
        "d.jsonl, line 4: ",
        "fields width",
        "⟦Red.<|im_end|>⟧",
        "tokens]⟧",
    ):
        assert words in ran.out, words
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<mark>Red.&lt;|im_end|&gt;</mark>" in html
    assert "<b>wall" not in html
    assert html.count("data:image/png;base64,") == 2
    assert "<script" not in html


def test_the_result_as_json(run: Run, tmp_path: Path) -> None:
    ran = run("data", "inspect", records(tmp_path), "--ignore", "tools", "--json")
    document = ran.json
    assert (document["kind"], document["usable"]) == ("jsonl", 3)
    assert document["unread_fields"] == ["width"]
    assert list(document["skipped"].values()) == [1]
    json.dumps(document)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kind", "csv"), 'read it with kind = "jsonl"'),
        (("--kind", "x"), "unknown data 'x'"),
        (("--form", "x"), "unknown form 'x'"),
        (("--images", "none"), "is not there"),
        (("--form", "alpaca"), "no sample can be used"),
        (("--tokens-per-pack", "3"), "no sample can be used"),
    ],
)
def test_wrong_options_are_one_error(
    run: Run, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    ran = run("data", "inspect", records(tmp_path), *options)
    assert ran.code == 1
    assert words in ran.err
    assert "Traceback" not in ran.err


def test_what_is_of_no_known_kind_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x00\x01")
    for path, words in ((tmp_path / "x.bin", "no known kind"), (tmp_path / "none", "none")):
        assert words in run("data", "inspect", path).err


def test_the_table_of_img2dataset_beside_a_shard_is_counted(run: Run, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_tar(tmp_path / "00000.tar", {"0.jpg": png(64, 64), "0.txt": b"a wall"})
    rows = [{"key": "0", "status": "success"}] + [{"key": "1", "status": "failed_to_download"}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    out = run("data", "inspect", tmp_path).out
    assert "3 rows of img2dataset: 2 failed_to_download, 1 success" in out
    assert "caption 1" in out
