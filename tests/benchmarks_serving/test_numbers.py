"""Percentiles, rates, slopes, ratios and tables, from invented outcomes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.serving.charts import draw_load, draw_soak
from benchmarks.serving.faults.check import Check, checks_table, is_engine_death, is_refusal, tally
from benchmarks.serving.load import ALONE, BESIDE, PAINTERS, LoadSettings, aims
from benchmarks.serving.processes import MemoryWatch, alive, resident_mb, tree
from benchmarks.serving.report import series_table
from benchmarks.serving.sending import Outcome
from benchmarks.serving.series import Series
from benchmarks.serving.server import ServerOptions
from benchmarks.serving.soak import IDLE_GAUGES, Soak, figures
from benchmarks.serving.stats import by_kind, latency, slope
from benchmarks.serving.workload import chat, mixed, paint

PNG = b"\x89PNG\r\n"


def answered(start: float, seconds: float, tokens: int = 30) -> Outcome:
    return Outcome(
        kind="chat",
        start=start,
        end=start + seconds,
        status=200,
        first_text=start + seconds / 10,
        tokens=tokens,
        prompt_tokens=40,
        cached_tokens=10,
    )


def painted(start: float, seconds: float) -> Outcome:
    return Outcome(kind="paint", start=start, end=start + seconds, status=200, images=1)


def refused(status: int = 429, error: str = "overloaded", after: str | None = "2") -> Outcome:
    return Outcome(kind="chat", start=1.0, end=1.0, status=status, error=error, retry_after=after)


def series(name: str, clients: int, outcomes: list[Outcome], asked: int | None = None) -> Series:
    return Series(
        name=name,
        clients=clients,
        asked=asked,
        started=100.0 * clients,
        kinds=by_kind(outcomes),
        peak_mb=500.0,
        memory=[(0.0, 400.0), (0.5, 500.0)],
    )


def test_rates_count_what_was_answered_over_the_whole_time() -> None:
    outcomes = [answered(0, 2), answered(1, 3), painted(0, 4), refused()]
    kinds = by_kind(outcomes)
    assert kinds["all"].requests == 4
    assert kinds["all"].request_rate == pytest.approx(3 / 4)
    assert kinds["all"].errors == {"429 overloaded": 1}
    assert kinds["chat"].token_rate == pytest.approx(60 / 4)
    assert kinds["chat"].mean_tokens == 30
    assert kinds["chat"].known_share == pytest.approx(1 / 4)
    assert kinds["paint"].image_rate == pytest.approx(1 / 4)
    assert kinds["paint"].first_text is None
    assert kinds["paint"].mean_tokens == 0


def test_percentiles_and_slopes() -> None:
    measured = latency([float(n) for n in range(101)])
    assert measured is not None
    assert (measured.p50, measured.p95) == (50, 95)
    assert latency([]) is None
    assert slope([(n / 2, 7 + 3 * n / 2) for n in range(20)]) == pytest.approx(3)
    assert slope([(1.0, 5.0)]) == 0


def test_ratios_are_read_against_their_aims() -> None:
    serial = [answered(n, 1) for n in range(8)]
    many = [answered(0, 2) for _ in range(8)]
    of_images = [painted(n, 1) for n in range(4)]
    all_series = [
        series("text", 1, serial),
        series("text", 16, many),
        series("images", 1, of_images),
        series("images", 16, [painted(0, 3) for _ in range(4)]),
        series(ALONE, 0, serial),
        series(BESIDE, PAINTERS, [*(answered(n, 3) for n in range(8)), *of_images]),
    ]
    text, images, growth = aims(all_series, LoadSettings(), ServerOptions())
    assert text.value == pytest.approx(4)
    assert images.value == pytest.approx(4 / 3)
    assert growth.value == pytest.approx(3)
    assert [f.met for f in (text, images, growth)] == [True, False, False]
    assert aims(all_series[:1], LoadSettings(), ServerOptions()) == []


def test_the_table_compares_with_one_client() -> None:
    one = series("mix", 1, [answered(0, 2), answered(2, 2)], asked=2)
    two = series("mix", 2, [answered(0, 2), answered(0, 2), refused()], asked=4)
    assert two.cut
    assert not one.cut
    lines = series_table([one, two]).splitlines()
    assert "×2.00" in lines[-1]
    assert "1 × 429 overloaded" in lines[-1]
    assert lines[-1].startswith("| mix (cut short) | 2 | chat | 3 ")
    assert {line.count("|") for line in lines} == {14}


def test_levels_always_hold_the_serial_one() -> None:
    assert LoadSettings(clients=(4, 16)).levels == [1, 4, 16]


def test_endings_of_requests_are_judged() -> None:
    assert is_refusal(refused(), 429)
    assert not is_refusal(refused(after=None), 429)
    assert not is_refusal(refused(after="0"), 429)
    assert is_engine_death(refused(503, "engine_restarting"))
    assert is_engine_death(refused(200, "engine_restarting", None))
    assert not is_engine_death(refused(500, "internal_error"))
    assert tally([answered(0, 1), refused()]) == (
        "1 × answered, 1 × 429 overloaded (Retry-After 2)"
    )
    table = checks_table([Check(scenario="a", what="b", passed=False, seen="c")])
    assert "| a | b | **FAIL** | c |" in table


def test_a_soak_is_judged_by_slope_errors_and_rest() -> None:
    idle = dict.fromkeys(IDLE_GAUGES, 0.0)
    good = Soak(
        kinds=by_kind([answered(0, 1)]),
        slope=0.2,
        fitted_from=60,
        peak_mb=500,
        idle_before=idle,
        idle_after=idle,
        memory=[],
    )
    assert all(f.met for f in figures(good, ServerOptions()))
    bad = replace(
        good,
        kinds=by_kind([answered(0, 1), refused()]),
        slope=3.0,
        idle_after=idle | {"requests": 1.0},
    )
    assert not any(f.met for f in figures(bad, ServerOptions()))


def test_charts_are_written(tmp_path: Path) -> None:
    mix = [series("mix", n, [answered(0, n), painted(0, 2 * n)]) for n in (1, 4)]
    draw_load(mix, tmp_path / "load.png")
    draw_load([series("images", 1, [painted(0, 2)])], tmp_path / "images.png")
    draw_soak([(0.0, 400.0), (60.0, 410.0)], 20.0, tmp_path / "soak.png")
    for name in ("load.png", "images.png", "soak.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_memory_of_a_tree_is_sampled() -> None:
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        root = os.getpid()
        assert tree(root)[0] == root
        assert child.pid in tree(root)
        with MemoryWatch(child.pid, seconds=0.01) as watch:
            assert alive(child.pid)
        assert child.stdin is not None
        child.stdin.close()
    assert watch.samples
    assert 1 < resident_mb(root) < 100_000
    assert not alive(child.pid)
    assert tree(child.pid) == []


def test_a_request_is_the_same_whenever_it_is_asked_for() -> None:
    assert mixed(7) == mixed(7)
    assert mixed(6) != mixed(7)
    kinds = [mixed(n).kind for n in range(100)]
    assert kinds.count("paint") == 20
    assert paint(3, steps=2).body["steps"] == 2
    contents = [chat(n).body["messages"][0]["content"] for n in range(8)]
    assert sum(isinstance(content, str) for content in contents) == 2
    assert "stream" not in chat(1, stream=False).body


def test_a_server_is_started_as_asked() -> None:
    options = ServerOptions(mode="separate", threads=2, more=("--cache-tokens", "64"))
    command = options.command(1234)
    assert command[command.index("--mode") + 1] == "separate"
    assert command[command.index("--port") + 1] == "1234"
    assert command[-2:] == ["--cache-tokens", "64"]
    named = replace(options, model=Path("/somewhere/model"))
    assert named.to_json()["model"] == "model"
