"""The run of SceneBench: who is always right gets everything, who is blind gets nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neounify.config.presets import SCENES, TINY
from neounify.data.sample import DataError
from neounify.errors import RequestError
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline
from neounify.scenes.bench import (
    TASKS,
    BenchConfig,
    Findings,
    Painting,
    PipelineSubject,
    copy_cases,
    edit_cases,
    measure,
    names,
    quick_scores,
    run_scenebench,
    write_folder,
)
from neounify.scenes.bench.category import THOUGHT_RIGHT
from neounify.scenes.world import PRESETS, SceneDataset, is_held_out, render, scene_config
from neounify.scenes.world.edits import EDIT_KINDS, KEEP_REQUESTS
from neounify.text import byte_tokenizer
from support.oracle import Blind, Oracle

NEAREST = Image.Resampling.NEAREST


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(world: str = "default", **fields: Any) -> BenchConfig:
    return BenchConfig(world=scene_config(world), **({"cases": 5, "batch_size": 3} | fields))


def untrained(preset: Any) -> Pipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pipeline(NeoUnify(preset).requires_grad_(False).eval(), byte_tokenizer())


@pytest.fixture(scope="module")
def small() -> Pipeline:
    """Untrained, as the bundled model but with fewer layers: tokens of 16 pixels."""
    return untrained(replace(SCENES, num_layers=1))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never ends its texts, so they end early."""
    for name in ("MAX_ANSWER_TOKENS", "MAX_STORY_TOKENS", "MAX_THOUGHT_TOKENS"):
        monkeypatch.setattr(f"neounify.scenes.bench.subject.{name}", 4)


@pytest.mark.parametrize("world", PRESETS)
def test_the_oracle_gets_everything_right(world: str) -> None:
    asked = config(world, think=True)
    outcomes = list(run_scenebench(Oracle(asked), asked))
    assert [o.score.category for o in outcomes] == names(asked)
    for outcome in outcomes:
        assert outcome.score.strict.value == 1, outcome.score.category
        assert len(outcome.examples) == asked.cases
        assert outcome.measures.get(THOUGHT_RIGHT, 1) == 1
    measures = {o.score.category: o.measures for o in outcomes}
    assert measures["edit"]["median_psnr_elsewhere"] == 100
    assert measures["edit"]["share_unchanged"] == measures["edit"][THOUGHT_RIGHT] == 1
    assert measures["reconstruction"] == {"psnr": 100, "median_psnr": 100, "ssim": 1}
    assert measures["paint/colours"]["seam_ratio"] == 1


def test_the_blind_one_gets_nothing() -> None:
    measured = measure(Blind(), cases_per_category=8, think=True)
    for score in measured.report.scores:
        assert score.strict.value == 0, score.category
    assert measured.report.measures["paint/size"][THOUGHT_RIGHT] == 0
    assert measured.report.measures["reconstruction"]["ssim"] < 0.5


def test_a_wrong_thought_is_counted_but_does_not_spoil_a_right_image() -> None:
    asked = config(tasks=("paint",), think=True)

    class Muddled(Oracle):
        def paint(self, *arguments: Any, **more: Any) -> list[Painting]:
            return [replace(item, thought="?") for item in super().paint(*arguments, **more)]

    for outcome in run_scenebench(Muddled(asked), asked):
        assert outcome.score.strict.value == 1
        assert outcome.measures[THOUGHT_RIGHT] == 0


def test_seen_and_held_out_cases_are_separated() -> None:
    asked = config(cases=8, tasks=("caption", "edit", "story", "reconstruction"))
    for outcome in run_scenebench(Oracle(asked), asked):
        score = outcome.score
        assert score.held_out is not None
        assert score.seen is not None
        assert (score.held_out.number, score.seen.number) == (2, 6)
        assert score.to_json()["seen"]["n"] == 6


def test_edits_and_relations_are_split_by_form() -> None:
    asked = config(cases=30, tasks=("vqa", "edit"))

    class Adverse(Oracle):
        """Leaves removals undone and says yes to every question of relation."""

        def edit(self, images: Any, instructions: Any, *rest: Any, **more: Any) -> Any:
            drawn = super().edit(images, instructions, *rest, **more)
            removals = ("Remove", "Take", "Delete", "Erase")
            return [
                replace(item, image=source) if text.startswith(removals) else item
                for item, source, text in zip(drawn, images, instructions, strict=True)
            ]

        def answer(self, images: Any, questions: Any) -> list[str]:
            answers = super().answer(images, questions)
            return ["yes" if answer in ("yes", "no") else answer for answer in answers]

    scores = {o.score.category: o.score for o in run_scenebench(Adverse(asked), asked)}
    edits = scores["edit"].forms
    assert set(edits) == set(EDIT_KINDS)
    assert {kind: rate.value for kind, rate in edits.items()} == {
        kind: float(kind != "remove") for kind in EDIT_KINDS
    }
    assert sum(rate.number for rate in edits.values()) == 30
    rates = scores["vqa/relation_yes_no"].forms
    assert {form: rate.value for form, rate in rates.items()} == {"answer no": 0, "answer yes": 1}
    assert set(scores["vqa/relation"].forms) == {"left or right?", "above or below?"}
    assert not scores["vqa/shape"].forms


def test_copies_are_asked_for_in_all_words_and_of_held_out_scenes_too() -> None:
    cases = copy_cases(scene_config("default"), 8)
    assert [is_held_out(case.scene) for case in cases] == [case.held_out for case in cases]
    assert [case.held_out for case in cases].count(True) == 2
    assert {case.request for case in cases} == set(KEEP_REQUESTS["en"])


def test_noise_depends_on_the_case_alone() -> None:
    def drawn(batch_size: int, cases: int = 5, seed: int = 0) -> list[tuple[str, int]]:
        asked = config(batch_size=batch_size, cases=cases, seed=seed)
        oracle = Oracle(asked)
        assert all(o.score.strict.value == 1 for o in run_scenebench(oracle, asked))
        return oracle.noise

    alone = drawn(1)
    assert drawn(64) == alone
    assert len({seed for _, seed in alone}) == len(alone)
    assert set(alone) <= set(drawn(3, cases=7))
    assert not set(alone) & set(drawn(3, seed=1))


def test_progress_counts_cases() -> None:
    calls: list[tuple[str, int, int]] = []
    measure(
        Blind(),
        tasks=["caption"],
        cases_per_category=5,
        batch_size=2,
        progress=lambda *now: calls.append(now),
    )
    assert calls == [("caption", 2, 5), ("caption", 4, 5), ("caption", 5, 5)]


def test_what_is_finished_is_kept_when_the_rest_is_not() -> None:
    asked = config(tasks=("caption", "edit"))

    class Stopped(Oracle):
        def edit(self, *arguments: Any, **more: Any) -> Any:
            raise KeyboardInterrupt

    outcomes = run_scenebench(Stopped(asked), asked)
    assert next(outcomes).score.category == "caption"
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)


@pytest.mark.usefixtures("brief")
def test_an_untrained_pipeline_runs_whatever_the_batch_size(small: Pipeline) -> None:
    def run(batch_size: int) -> Findings:
        return measure(
            small, world="easy", tasks=TASKS[:4], cases_per_category=3, steps=2, guidance=2.0,
            batch_size=batch_size,
        )  # fmt: skip

    together, alone = run(3), run(1)
    assert together.report.scores == alone.report.scores
    for one, other in zip(together.outcomes, alone.outcomes, strict=True):
        for a, b in zip(one.examples, other.examples, strict=True):
            assert a.answer == b.answer
            assert a.image is not None
            assert b.image is not None
            assert np.abs(a.image.astype(int) - b.image).max() <= 1  # of 255: rounding
    assert together.report.about["sampling"]["steps"] == 2
    assert together.report.about["torch"] == torch.__version__


def test_a_pipeline_generates_each_case_from_separate_noise(small: Pipeline) -> None:
    subject = PipelineSubject(small, steps=1)
    source = np.full((64, 64, 3), 90, np.uint8)
    for first, second in (
        subject.paint(["a star"] * 2, 64, [1, 2], think=False),
        subject.edit([source] * 2, ["Copy it."] * 2, [1, 2], think=False),
    ):
        assert first.image.shape == (64, 64, 3)
        assert (first.image != second.image).any()


@pytest.mark.usefixtures("brief")
def test_an_untrained_pipeline_thinks_writes_and_copies(small: Pipeline) -> None:
    measured = measure(
        small, world="easy", tasks=("paint", "story", "reconstruction"), cases_per_category=1,
        steps=1, think=True,
    )  # fmt: skip
    by_name = {o.score.category: o for o in measured.outcomes}
    assert by_name["paint/layout"].examples[0].thought is not None
    assert by_name["reconstruction"].examples[0].thought is None


def test_quick_scores_are_strict_rates() -> None:
    assert quick_scores(Blind(), "easy", 2)["bench/paint/colours"] == 0
    asked = config("easy", cases=2, seed=1)
    rates = quick_scores(Oracle(asked), asked.world, 2)
    assert set(rates.values()) == {1.0}
    assert "bench/edit" in rates
    assert "bench/vqa/shape" in rates


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks": ("paint", "dance")}, "no task dance; there are paint"),
        ({"tasks": ()}, "each once"),
        ({"tasks": ("edit", "edit")}, "each once"),
        ({"cases": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"seed": -1}, "2\\^32"),
        ({"token_size": 48}, "64 pixels do not divide into tokens of 48"),
    ],
)
def test_what_cannot_be_measured_is_said(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        config(**fields)


def test_a_model_with_large_tokens_and_bad_sampling_are_refused(small: Pipeline) -> None:
    with pytest.raises(DataError, match="no difficulty"):
        measure(small, world="nowhere")
    with pytest.raises(RequestError, match="steps"):
        measure(small, steps=0)
    big = untrained(TINY)
    with pytest.raises(DataError, match="tokens of 32"):
        measure(big, world=replace(PRESETS["easy"], side=48))


def test_a_folder_holds_report_and_sheets_of_one_run(tmp_path: Path) -> None:
    def files(subject: Any, tasks: tuple[str, ...]) -> set[str]:
        measured = measure(subject, tasks=tasks, cases_per_category=2)
        written = write_folder(measured.report, measured.outcomes, tmp_path)
        assert sorted(written) == sorted(p for p in tmp_path.iterdir() if p.name != "mine.png")
        return {path.name for path in written}

    (tmp_path / "mine.png").write_bytes(b"not of a run")
    assert files(Blind(), ("caption", "edit")) == {
        *("report.json", "report.md", "caption-wrong.png", "edit-wrong.png"),
    }
    asked = config(cases=2, tasks=("edit", "story"))
    assert files(Oracle(asked), ("edit", "story")) == {
        *("report.json", "report.md", "edit-right.png", "story-right.png"),
    }
    edit = edit_cases(asked.world, 2, asked.seed)[0].edit
    with Image.open(tmp_path / "edit-right.png") as sheet:
        for left, scene in ((14, edit.source), (14 + 128 + 4, edit.target)):
            shown = sheet.crop((left, 14, left + 128, 14 + 128)).resize((64, 64), NEAREST)
            assert (np.asarray(shown) == render(scene, asked.world)).all()
    assert "edit: median_psnr_elsewhere | 100.000" in (tmp_path / "report.md").read_text("utf-8")


def test_one_edit_in_ten_asks_for_a_copy() -> None:
    data = SceneDataset(0, scene_config("easy"), {"edit": 1.0}, chinese=0.5)
    copies: list[str] = []
    for index in range(400):
        sample = data[index]
        shown, wanted = (image.pixels() for image in sample.images)
        if (shown == wanted).all():
            copies.append(sample.text("user"))
    assert 20 <= len(copies) <= 65
    assert any("Copy" in text for text in copies)
    assert any("照样" in text for text in copies)
