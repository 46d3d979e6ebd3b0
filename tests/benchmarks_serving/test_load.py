"""The load test from its command line to its report, as small as it gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.serving.__main__ import main


@pytest.mark.slow
def test_a_small_load_is_reported(tmp_path: Path) -> None:
    arguments = "load --only mix --clients 2 --many 2 --requests 5 --seconds 120 --threads 1"
    assert main([*arguments.split(), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    serial, both = report["series"]
    assert (serial["clients"], both["clients"]) == (1, 2)
    for series in (serial, both):
        kinds = series["kinds"]
        assert (kinds["all"]["requests"], kinds["paint"]["requests"]) == (5, 1)
        assert kinds["all"]["errors"] == {}
        assert kinds["chat"]["mean_tokens"] >= 10
        assert kinds["chat"]["first_text"]["p50"] <= kinds["chat"]["total"]["p50"]
        assert series["peak_mb"] > 50
        assert series["memory"]
    assert report["date"]
    assert report["machine"]["processor"]
    assert "| mix | 2 | chat |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "load.png").stat().st_size > 1000
