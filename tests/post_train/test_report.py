"""The report page: what it shows of a run, escaping, damaged files, curves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest

from neounify.errors import NeounifyError
from neounify.post_train.curves import (
    COLOURS,
    MAX_POINTS,
    chart,
    number_text,
    running_mean,
    thinned,
    ticks,
)
from neounify.post_train.report import list_failures, page, write_report
from support.post_training import described, run
from train.test_trainer import trainer

EVIL = "<script>alert('&')</script>"


def line(step: int, values: dict[str, Any]) -> dict[str, Any]:
    counters = {"step": step, "stage": "rl", "images": 8 * step, "seconds": 2.0 * step}
    return {"kind": "train", **counters} | values


def written(folder: Path, lines: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "log.jsonl").write_text(text)
    return write_report(folder).read_text(encoding="utf-8")


def names(html: str) -> list[str]:
    """Titles of the charts."""
    return re.findall(r"<figcaption>(.*?)</figcaption>", html)


class Checker(HTMLParser):
    """Addresses that a page would load, and elements that run programs."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("data:image/png;base64,"):
                self.outside.append(str(value))


def test_a_run_has_a_page(tmp_path: Path) -> None:
    run(tmp_path, "flow-grpo", {"sheet_every": 1}, steps=4)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for title in ("reward and its parts", "reward by category", "KL of the update, nats"):
        assert any(name.startswith(title) for name in names(html)), title
    assert html.count("</i>step0: ") == 4  # kl, ratio, its spread, clipped
    assert "method.window" in html
    assert html.count("data:image/png;base64,") == 4
    checker = Checker()
    checker.feed(html)
    assert not checker.outside
    assert "script" not in checker.tags
    assert json.loads((tmp_path / "stages.json").read_text())["post"]["method"]["group"] == 3


def test_a_distillation_has_the_loss_of_each_step(tmp_path: Path) -> None:
    run(tmp_path, "trajectory", steps=3)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "loss of each step, logarithmic" in names(html)
    assert "step1: " in html


def test_a_long_distillation_has_a_page_before_its_end(tmp_path: Path) -> None:
    training = trainer(tmp_path, described("dmd2", {"sheet_every": 2}))
    training.run(stop_after=3)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "step 1, " in html  # the page of step 2 is written before that step's report
    training = trainer(tmp_path / "none", described("dmd2", {"sheet_every": 0}))
    training.run(stop_after=3)
    assert not (tmp_path / "none" / "report.html").exists()


def test_sheets_of_two_stages_stay_apart(tmp_path: Path) -> None:
    one = described("nft", {"sheet_every": 1}, steps=1)
    stages = [replace(one.stages[0], name=name) for name in ("first", "second")]
    trainer(tmp_path, replace(one, stages=tuple(stages))).run()
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == [f"stage-{n}-iteration-000000-{i}.png" for n in (0, 1) for i in (0, 1)]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "first, second: step 2" in html
    assert html.count("<details>") == 2


def test_failed_rewards_are_listed(tmp_path: Path) -> None:
    rewards = [{"kind": "program", "name": "support.rewards:some_fail"}]
    run(tmp_path, "nft", {"rewards": rewards, "max_failed_rewards": 0.9}, steps=3)
    lines = (tmp_path / "failed_rewards.txt").read_text().splitlines()
    assert lines[0].startswith("iteration 0: program reward of ")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Rewards that failed" in html
    assert "no light" in html


def test_warnings_are_in_the_log_and_on_the_page(tmp_path: Path) -> None:
    rewards = [{"kind": "program", "name": "support.rewards:alike"}]
    run(tmp_path, "nft", {"rewards": rewards, "kl": 0.0}, steps=4)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "draw harder or easier prompts" in html
    assert html.count('class="warning"') == 1  # alike ones together


def test_a_resumed_run_does_not_repeat_warnings(tmp_path: Path) -> None:
    rewards = [{"kind": "program", "name": "support.rewards:alike"}]
    method = {"rewards": rewards, "kl": 0.0, "updates": 1}
    run(tmp_path / "whole", "nft", method)
    trainer(tmp_path / "cut", described("nft", method)).run(stop_after=3)
    again = trainer(tmp_path / "cut", described("nft", method))
    again.resume(tmp_path / "cut" / "states" / "step-00000002")
    again.run()
    kept = []
    for name in ("whole", "cut"):
        lines = map(json.loads, (tmp_path / name / "warnings.jsonl").read_text().splitlines())
        kept.append([(x["step"], x["message"]) for x in lines])
    assert kept[0] == kept[1] != []


def test_everything_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "a<b>&c"
    (folder / "rollouts").mkdir(parents=True)
    image = PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    image.save(folder / "rollouts" / "iteration-000001-<i>.png")
    (folder / "stages.json").write_text(json.dumps({EVIL: {EVIL: [EVIL], "b": {EVIL: EVIL}}}))
    list_failures(folder, 3, [EVIL])
    (folder / "warnings.jsonl").write_text(json.dumps({"step": 1, "message": EVIL}))
    html = written(
        folder,
        [
            line(1, {"reward": 0.5, f"reward/by/{EVIL}": 0.5, f"{EVIL}/x": 1.0, "stage": EVIL}),
        ],
    )
    checker = Checker()
    checker.feed(html)
    assert not checker.tags & {"script", "b<", "i>"}
    assert "<script" not in html
    assert "<b>&c" not in html
    assert html.count("&lt;script&gt;") >= 6


def test_rewards_that_fell_are_marked(tmp_path: Path) -> None:
    lines = [
        line(n, {"reward": 0.1 * n, "reward/by/edit": 1 - 0.1 * n, "reward/failed": 0.0})
        for n in range(8)
    ]
    html = written(tmp_path, lines)
    rows = re.findall(
        r"<tr><td>rl<td>(\w+)<td.*?>(.*?)<td.*?>(.*?)<td class=\"(.*?)\">(.*?)</tr>", html
    )
    assert rows == [
        ("reward", "0.100", "0.600", "n", "+0.500"),
        ("failed", "0.000", "0.000", "n", "+0.000"),
        ("edit", "0.900", "0.400", "n fell", "-0.500"),
    ]


def test_logs_that_are_damaged_or_empty(tmp_path: Path) -> None:
    with pytest.raises(NeounifyError, match=r"holds no log\.jsonl"):
        write_report(tmp_path)
    assert "no report yet" in written(tmp_path, [])
    (tmp_path / "stages.json").write_text("[")
    lines = [
        line(1, {"reward": 0.5}),
        line(2, {"reward": None}),
        line(3, {"reward": 0.25, "note": "text"}),
    ]
    text = "".join(json.dumps(one) + "\n" for one in lines) + '{"kind": "train", "st\n7\n{}\n'
    (tmp_path / "log.jsonl").write_text(text)
    html = page(tmp_path)
    assert "reward: 0.5 to 0.25" in html
    assert "step 3, 24 images" in html


# --- curves ---


def drawn(svg: str) -> list[list[tuple[float, float]]]:
    """Places of the points of each line."""
    root = ElementTree.fromstring(re.sub(r"<figcaption>.*?</figcaption>", "", svg))
    lines = []
    for path in root.iter("path"):
        if path.get("class") is None:
            pairs = re.findall(r"([\d.]+) ([\d.]+)", path.get("d") or "")
            lines.append([(float(x), float(y)) for x, y in pairs])
    return lines


def test_a_chart_is_well_formed_and_to_scale() -> None:
    [line] = drawn(chart("a & <b>", {"x": [(0, 0.0), (1, 1.0), (2, 2.0)]}))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y1 > y2
    [line] = drawn(
        chart("log", {"x": [(0, 1e-6), (1, 1e-4), (2, 1e-2), (3, 0.0)]}, logarithmic=True)
    )
    assert len(line) == 3
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.11)


def test_many_lines_and_points() -> None:
    lines = {f"line {n}": [(x, float(n)) for x in range(1000)] for n in range(2 * len(COLOURS))}
    svg = chart("many", lines)
    assert len(drawn(svg)) == len(lines)
    assert svg.count('class="faint"') == len(lines)  # their values behind running means
    assert "stroke-dasharray" in svg
    assert max(len(points) for points in drawn(svg)) <= MAX_POINTS
    assert chart("none", {"a": [], "b": [(1, 0.0)]}, logarithmic=True) == ""
    assert "<circle" in chart("one", {"a": [(3, 5.0)]})


def test_thinning_and_means() -> None:
    points = [(float(x), 2.0 * x) for x in range(3 * MAX_POINTS)]
    assert thinned(points)[0] == (1.0, 2.0)
    assert [y for _, y in running_mean([(x, 4.0) for x in range(9)])] == pytest.approx([4.0] * 9)
    means = running_mean([(0, 1.0), (1, 100.0)], logarithmic=True)
    assert 1 < means[1][1] < 100
    assert [y for _, y in running_mean([(1, 1.0), (2, 9.0), (3, 5.0)], borders=[2])][2] == 5.0


def test_ticks_and_numbers() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks(-3, 103) == pytest.approx([0, 50, 100])
    assert ticks(2, 2) == [2]
    texts = [number_text(value) for value in (0, 0.5, 1e-5, 123456, 1234, 0.98765)]
    assert texts == ["0", "0.5", "1.00e-05", "1.23e+05", "1,234", "0.9877"]


def test_skipped_samples_are_listed_by_reason(tmp_path: Path) -> None:
    reasons = {f"{EVIL}.jsonl": {"the caption is empty": 1200, EVIL: 3}}
    html = written(
        tmp_path, [line(1, {}), line(2, {"skipped_by_reason": reasons, "skipped": {"a": 1203}})]
    )
    assert "Samples that were skipped" in html
    assert "<td class=n>1,200<td>the caption is empty" in html
    assert EVIL not in html
    assert "Samples that were skipped" not in written(tmp_path, [line(1, {})])
