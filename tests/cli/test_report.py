"""`report`: the page of a run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_page_is_written_from_the_log(run_bare: Callable[..., Any], tmp_path: Path) -> None:
    log = '{"kind": "train", "stage": "rl", "step": 3, "images": 9, "reward": 0.5}\n'
    (tmp_path / "log.jsonl").write_text(log)
    ran = run_bare("report", tmp_path)
    assert ran.code == 0, ran.err
    assert "report.html" in ran.out
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "step 3, 9 images" in html
    assert "reward: 0.5" in html


def test_a_folder_that_is_no_run(run_bare: Callable[..., Any], tmp_path: Path) -> None:
    ran = run_bare("report", tmp_path)
    assert ran.code == 1
    assert "holds no log.jsonl" in ran.err
