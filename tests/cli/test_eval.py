"""`eval`: the report's folder, the table, what is refused, and Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.bench.result import Result
from neounify.cli.eval import EvalOptions
from neounify.config.presets import MOTION
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline
from neounify.scenes.bench import TASKS, Category
from neounify.text import byte_tokenizer

QUICK = ("eval", "--quick", "--cases", "2", "--steps", "1")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never ends its texts, so they end early."""
    for name in ("MAX_ANSWER_TOKENS", "MAX_STORY_TOKENS", "MAX_THOUGHT_TOKENS"):
        monkeypatch.setattr(f"neounify.scenes.bench.subject.{name}", 4)


def test_all_tasks_of_the_toy(run: Callable[..., Any], tmp_path: Path) -> None:
    ran = run(*QUICK, "--world", "easy")
    assert ran.code == 0, ran.err
    assert "saved out/eval" in ran.out
    assert "paint/counting" in ran.out
    assert "held out" in ran.out
    report = json.loads((tmp_path / "out/eval/report.json").read_text("utf-8"))
    about = report["about"]
    assert about["tasks"] == list(TASKS)
    assert (about["cases"], about["seed"], about["world"]) == (2, 0, "easy")
    assert about["sampling"]["steps"] == 1
    assert about["model"]["folder"] == "toy"
    assert about["categories_left"] == 0
    assert {"seconds", "processor", "cpus", "threads", "torch", "neounify"} <= set(about)
    assert {s["strict"]["n"] for s in report["scores"]} == {2}
    assert "| category | n | strict" in (tmp_path / "out/eval/report.md").read_text("utf-8")
    assert (tmp_path / "out/eval/edit-wrong.png").is_file()


def test_one_line_of_json(run: Callable[..., Any]) -> None:
    ran = run(*QUICK, "--tasks", "caption", "--think", "--seed", "3", "--json", "-o", "here")
    assert ran.json["about"]["think"] is True
    assert [s["category"] for s in ran.json["scores"]] == ["caption"]


def test_quiet_prints_only_the_folder(run: Callable[..., Any]) -> None:
    ran = run(*QUICK, "--tasks", "caption", "--quiet", "--out", "here")
    assert (ran.out, ran.err) == ("here\n", "")


def test_clips_of_a_model_that_generates_them(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neounify.motion.bench.subject.MAX_ANSWER_TOKENS", 4)
    config = MOTION.replace(num_layers=1, vocab_size=264)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Pipeline(NeoUnify(config).eval(), byte_tokenizer()).save(tmp_path / "clips")
    ran = run(*QUICK, "--benchmark", "motion", "--world", "easy", "--model", "clips")
    assert ran.code == 0, ran.err
    assert "clip/direction" in ran.out
    folder = tmp_path / "out/eval"
    about = json.loads((folder / "report.json").read_text("utf-8"))["about"]
    assert about["tasks"] == ["direction", "kind", "question", "continue"]
    assert about["sampling"]["steps"] == 1
    result = Result.read(folder)
    assert result.about["benchmark"] == "motionbench"
    assert (folder / "continue-wrong.png").is_file()


def test_how_many_cases() -> None:
    assert EvalOptions().number == 200
    assert EvalOptions(quick=True).number == 32
    assert EvalOptions(quick=True, cases=7).number == 7


def test_nothing_is_overwritten_unasked(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "out/eval"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    command = (*QUICK, "--tasks", "caption")
    ran = run(*command)
    assert ran.code == 1
    assert "not empty" in ran.err
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert run(*command, "--overwrite").code == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "report.json").is_file()
    ran = run(*command, "--overwrite", "--output", "file")
    assert ran.code == 1
    assert "is a file" in ran.err


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        (("--world", "nowhere"), 2, "no difficulty 'nowhere'"),
        (("--tasks", "paint,dance"), 2, "no task dance"),
        (("--tasks", ","), 2, "some of paint, vqa"),
        (("--seed", "99999999999"), 2, "2^32"),
        (("--cases", "0"), 2, "--cases"),
        (("--steps", "0"), 1, "steps must be from 1"),
        (("--guidance", "nan"), 1, "guidance"),
        (("--model", "elsewhere"), 1, "does not exist"),
        (("--benchmark", "videos"), 2, "no benchmark 'videos'; there are scenes, motion"),
        (("--benchmark", "motion"), 1, "not trained to generate videos"),
        (("--benchmark", "motion", "--world", "wide"), 2, "no difficulty 'wide'"),
        (("--benchmark", "motion", "--tasks", "paint"), 2, "no task paint"),
        (("--benchmark", "motion", "--think"), 2, "without a thought"),
    ],
)
def test_one_clear_error(
    run: Callable[..., Any], tmp_path: Path, option: tuple[str, str], code: int, words: str
) -> None:
    ran = run("eval", *option)
    assert ran.code == code
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_what_is_finished_is_reported_after_a_stop(
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: type[BaseException],
) -> None:
    measured = Category.run

    def until_edit(self: Category, done: Any = None) -> Any:
        if self.name == "edit":
            raise stop
        return measured(self, done)

    monkeypatch.setattr(Category, "run", until_edit)
    ran = run(*QUICK, "--tasks", "caption,edit")
    if stop is KeyboardInterrupt:
        assert ran.code == 130
        assert "interrupted; 1 of 2 categories are measured, see out/eval" in ran.err
    else:
        assert ran.code == 1
        assert "out of memory" in ran.err
    assert "caption" in ran.out
    report = json.loads((tmp_path / "out/eval/report.json").read_text("utf-8"))
    assert [s["category"] for s in report["scores"]] == ["caption"]
    assert report["about"]["categories_left"] == 1


def test_a_stop_before_anything_is_finished_leaves_nothing(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Category, done: Any = None) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Category, "run", stopped)
    ran = run(*QUICK)
    assert ran.code == 130
    assert "0 of" in ran.err
    assert not list(tmp_path.iterdir())
