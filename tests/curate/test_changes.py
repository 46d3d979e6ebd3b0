"""What has changed between runs, or while one runs, is noticed; nothing old is used for it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from neounify.curate import CurateError, CurateRecipe, curate, recipe_from_table
from neounify.curate import run as run_module
from neounify.curate.hooks import hook_digest, load_hook
from neounify.curate.seconds import SecondsLog
from support.curation import (
    bytes_of,
    encoded,
    reasons_of,
    recipe_of,
    table_of,
    textured,
    write_samples,
)
from support.own_data import write_tar

ONE = ("one", encoded(textured(1)), "a view of stone one")
TWO = ("two", encoded(textured(2)), "a view of stone two")


def recipe(folder: Path, **stages: Any) -> CurateRecipe:
    return recipe_of({"web": folder / "samples.jsonl"}, folder, stages=stages, max_unreadable=1.0)


def test_a_changed_image_beside_an_unchanged_list_is_measured_anew(tmp_path: Path) -> None:
    write_samples(tmp_path / "in", [ONE, TWO])
    curate(recipe(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "in" / "two.img").write_bytes(encoded(textured(3, 200, 300)))
    curate(recipe(tmp_path / "in"), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"one": None, "two": "geometry.min_side"}
    (tmp_path / "in" / "two.img").unlink()
    curate(recipe(tmp_path / "in"), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"one": None, "two": "readable.image"}
    (tmp_path / "in" / "two.img").write_bytes(TWO[1])
    curate(recipe(tmp_path / "in"), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"one": None, "two": None}


def test_a_longer_list_is_read_anew_in_the_same_process(tmp_path: Path) -> None:
    write_samples(tmp_path / "in", [ONE])
    assert curate(recipe(tmp_path / "in"), tmp_path / "out").samples == {"web": 1}
    write_samples(tmp_path / "in", [ONE, TWO])
    assert curate(recipe(tmp_path / "in"), tmp_path / "out").samples == {"web": 2}


def test_times_of_files_do_not_change_the_results(tmp_path: Path) -> None:
    write_samples(tmp_path / "in", [ONE, TWO])
    curate(recipe(tmp_path / "in"), tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    for file in (tmp_path / "in").iterdir():
        os.utime(file, (1, 1))
    curate(recipe(tmp_path / "in"), tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before


def test_an_image_that_changes_during_a_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "in", [ONE, TWO])
    real = run_module.decide

    def decide(*arguments: Any) -> Any:
        (tmp_path / "in" / "two.img").write_bytes(ONE[1])
        return real(*arguments)

    monkeypatch.setattr(run_module, "decide", decide)
    with pytest.raises(CurateError, match=r"samples.jsonl, line 2: an image has changed"):
        curate(recipe(tmp_path / "in"), tmp_path / "out")
    monkeypatch.undo()
    curate(recipe(tmp_path / "in"), tmp_path / "out")
    assert reasons_of(tmp_path / "out")["two"] == "exact.copy"


def test_an_image_that_goes_during_a_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "in", [ONE, TWO])
    real = run_module.decide

    def decide(*arguments: Any) -> Any:
        (tmp_path / "in" / "two.img").unlink()
        return real(*arguments)

    monkeypatch.setattr(run_module, "decide", decide)
    with pytest.raises(CurateError, match="line 2 has changed while it was read"):
        curate(recipe(tmp_path / "in"), tmp_path / "out")


def test_texts_of_an_evaluation_set_that_change_are_compared_again(tmp_path: Path) -> None:
    words = "the long text of an evaluation that nothing else is like at all"
    write_samples(tmp_path / "in", [("a", None, words)])
    sets = [{"kind": "jsonl", "path": str(tmp_path / "test" / "samples.jsonl")}]
    write_samples(tmp_path / "test", [("e", None, "other words that are of no use to anyone")])
    curate(recipe(tmp_path / "in", evaluation={"sets": sets}), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"a": None}
    write_samples(tmp_path / "test", [("e", None, words)])
    curate(recipe(tmp_path / "in", evaluation={"sets": sets}), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"a": "evaluation.text"}


HOOK = "def score(images, texts):\n    return [{value} for _ in images]\n"


def test_a_changed_hook_is_called_anew(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "in", [ONE]).parent
    for value, expected in ((0.1, None), (0.9, "watermark.bound")):
        (folder / "marks_of_one.py").write_text(HOOK.format(value=value))
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        # As in a new process.
        sys.modules.pop("marks_of_one", None)
        load_hook.cache_clear()
        hook_digest.__globals__["_loaded"].clear()
        curate(recipe(folder, watermark={"hook": "marks_of_one:score"}), tmp_path / "out")
        assert reasons_of(tmp_path / "out") == {"one": expected}


def test_a_hook_that_changed_since_it_was_loaded_is_an_error(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "in", [ONE]).parent
    (folder / "marks_of_two.py").write_text(HOOK.format(value=0.1))
    marked = recipe(folder, watermark={"hook": "marks_of_two:score"})
    curate(marked, tmp_path / "out")
    (folder / "marks_of_two.py").write_text(HOOK.format(value=0.9))
    with pytest.raises(CurateError, match=r"marks_of_two.py has changed since this process"):
        curate(marked, tmp_path / "out")


def test_lists_of_known_bad_files_that_change_are_read_anew(tmp_path: Path) -> None:
    write_samples(tmp_path / "in", [ONE, TWO])
    curate(recipe(tmp_path / "in"), tmp_path / "out")
    hashes = {row["id"]: row["images"][0]["sha256"] for row in table_of(tmp_path / "out")}
    listed = tmp_path / "files.txt"
    for name in ("one", "two"):
        listed.write_text(f"{hashes[name]}\n")
        os.utime(listed, ns=(0, {"one": 10**18, "two": 2 * 10**18}[name]))
        curate(recipe(tmp_path / "in", known={"sha256": str(listed)}), tmp_path / "out")
        reasons = reasons_of(tmp_path / "out")
        assert [n for n, reason in reasons.items() if reason == "known.sha256"] == [name]


def test_seconds_are_kept_for_later_runs(tmp_path: Path) -> None:
    write_samples(tmp_path / "in", [ONE, TWO])
    first = curate(recipe(tmp_path / "in"), tmp_path / "out").seconds
    assert first["web"]["readable"] > 0
    assert first["all sources"]["near"] > 0
    log = tmp_path / "out" / "work" / "seconds.jsonl"
    log.write_text(log.read_text() + '\n{"part": "cut o')  # a kill while it was written
    assert curate(recipe(tmp_path / "in"), tmp_path / "out").seconds == first
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>web</td>" in page
    assert "web: in" in page


def test_the_last_seconds_of_a_part_count(tmp_path: Path) -> None:
    log = SecondsLog(tmp_path / "seconds.jsonl")
    assert log.of({"a"}) == {}
    for seconds in (1.0, 2.0):
        log.add("a", {"near": seconds})  # type: ignore[arg-type]
    assert log.of({"a", "b"}) == {"a": {"near": 2.0}}


def test_captions_of_a_table_beside_a_shard_that_change_are_read_anew(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": ONE[1]})
    web = {"name": "web", "kind": "shards", "path": str(tmp_path / "a.tar")}
    for caption, reason in (("a view of stone", None), ("x", "text.min_words")):
        cells = {"key": ["0"], "caption": [caption]}
        pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "a.parquet")
        curate(recipe_from_table({"sources": [web]}), tmp_path / "out")
        assert list(reasons_of(tmp_path / "out").values()) == [reason]
