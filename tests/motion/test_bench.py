"""MotionBench: a subject that is always right gets everything, a blind one nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neounify.bench.scenes import scene_result
from neounify.data import DataError
from neounify.motion.bench import (
    MOTION_BENCH_TASKS,
    MotionBenchConfig,
    MotionSubject,
    continue_cases,
    known_motion_names,
    motion_cases,
    motion_names,
    motion_plan,
    motion_question_cases,
)
from neounify.motion.bench.follow import Clip
from neounify.motion.bench.run import strip
from neounify.motion.world import is_held_out, motion_config, render_motion
from neounify.scenes.bench import Outcome, write_folder
from neounify.scenes.bench.run import to_report


def config(world: str = "default", **fields: Any) -> MotionBenchConfig:
    return MotionBenchConfig(world=motion_config(world), **({"cases": 4, "batch_size": 3} | fields))


class Oracle:
    """Knows all cases of a run: gives true clips and true answers."""

    def __init__(self, asked: MotionBenchConfig) -> None:
        def clip(scene: Any) -> Clip:
            return render_motion(scene, asked.world)

        tasks = [task for task in ("direction", "kind", "pair") if task in asked.tasks]
        self.clips = {
            (case.prompt, case.scene.frames): clip(case.scene)
            for task in tasks
            for case in motion_cases(task, asked)
        }
        self.answers = {
            (clip(case.scene).tobytes(), case.question.text): case.question.answer
            for kind in asked.question_kinds
            for case in motion_question_cases(kind, asked)
        }
        self.rests = {
            clip(case.scene)[: case.start].tobytes(): clip(case.scene)[case.start :]
            for case in continue_cases(asked)
        }
        self.seeds: list[int] = []

    def film(
        self, prompts: Sequence[str], frames: Sequence[int], side: int, seeds: Sequence[int]
    ) -> list[Clip]:
        assert side == 64
        self.seeds += seeds
        return [self.clips[asked] for asked in zip(prompts, frames, strict=True)]

    def watch(self, clips: Sequence[Clip], questions: Sequence[str]) -> list[str]:
        return [self.answers[c.tobytes(), q] for c, q in zip(clips, questions, strict=True)]

    def extend(
        self,
        clips: Sequence[Clip],
        requests: Sequence[str],
        frames: Sequence[int],
        seeds: Sequence[int],
    ) -> list[Clip]:
        self.seeds += seeds
        rests = [self.rests[clip.tobytes()] for clip in clips]
        assert [len(rest) for rest in rests] == list(frames)
        return rests


class Blind:
    """Gives grey frames, and knows nothing."""

    def film(
        self, prompts: Sequence[str], frames: Sequence[int], side: int, seeds: Sequence[int]
    ) -> list[Clip]:
        return [np.full((n, side, side, 3), 127, np.uint8) for n in frames]

    def watch(self, clips: Sequence[Clip], questions: Sequence[str]) -> list[str]:
        return ["I do not know."] * len(clips)

    def extend(
        self,
        clips: Sequence[Clip],
        requests: Sequence[str],
        frames: Sequence[int],
        seeds: Sequence[int],
    ) -> list[Clip]:
        return self.film(requests, frames, 64, seeds)


def run(subject: MotionSubject, asked: MotionBenchConfig) -> list[Outcome]:
    return [category.run() for category in motion_plan(subject, asked)]


@pytest.fixture(scope="module")
def right() -> list[Outcome]:
    return run(Oracle(config()), config())


def test_the_oracle_gets_everything_right(right: list[Outcome]) -> None:
    assert [outcome.score.category for outcome in right] == motion_names(config())
    assert {outcome.score.category for outcome in right} == set(known_motion_names())
    for outcome in right:
        assert outcome.score.strict.value == 1, outcome.score.category
        assert outcome.score.strict.number == 4
        assert outcome.held_out == (False, False, False, True)
        assert all(value == 1 for value in outcome.measures.values())
        assert bool(outcome.measures) == (not outcome.score.category.startswith("question"))


def test_the_blind_get_nothing() -> None:
    for outcome in run(
        Blind(), config("easy", tasks=("direction", "kind", "question", "continue"))
    ):
        assert outcome.score.strict.value == 0, outcome.score.category


def test_cases_and_noise_depend_on_the_seed_alone() -> None:
    asked = config(tasks=("direction", "continue"), batch_size=2)
    one, two = Oracle(asked), Oracle(asked)
    run(one, asked)
    run(two, config(tasks=("direction", "continue"), batch_size=4))
    assert one.seeds == two.seeds
    assert len(set(one.seeds)) == 8
    other = config(tasks=("direction",), seed=1)
    assert [c.prompt for c in motion_cases("direction", other)] != [
        c.prompt for c in motion_cases("direction", asked)
    ]


def test_cases_are_what_their_category_says() -> None:
    asked = config(cases=12)
    for task in ("direction", "kind", "pair"):
        for case in motion_cases(task, asked):
            assert len(case.scene.movers) == (2 if task == "pair" else 1)
            kind = case.scene.movers[0].motion.kind
            assert task == "pair" or (kind == "move") == (task == "direction")
            assert is_held_out(case.scene) == case.held_out
    forms = {case.form for case in motion_cases("kind", asked)}
    assert forms == {"grow", "shrink", "appear", "vanish", "bounce", "stay"}
    for going_on in continue_cases(asked):
        assert going_on.start % 4 == 0
        assert 4 <= going_on.start <= going_on.scene.frames / 2
        assert {m.motion.kind for m in going_on.scene.movers} <= {
            *("move", "grow", "shrink", "bounce", "stay")
        }


def test_a_report_has_sheets_and_a_result_that_compares(
    right: list[Outcome], tmp_path: Path
) -> None:
    about = {"world": "default", "cases": 4, "seed": 0, "tasks": list(MOTION_BENCH_TASKS)}
    report = to_report(right, about)
    stale = tmp_path / "clip-kind-wrong.png"
    stale.write_bytes(b"")
    files = write_folder(report, right, tmp_path, known_motion_names())
    assert not stale.exists()
    sheets = [path for path in files if path.suffix == ".png"]
    assert len(sheets) == len(right)
    with Image.open(tmp_path / "clip-direction-right.png") as sheet:
        assert sheet.width > 8 * 128
    assert "| clip/direction | 4 | 100.0" in (tmp_path / "report.md").read_text("utf-8")
    result = scene_result(right, about, "motionbench")
    assert result.about["benchmark"] == "motionbench"
    assert len(result.cases) == 4 * len(right)


def test_strips_show_a_clip_from_end_to_end() -> None:
    clip = np.stack([np.full((4, 4, 3), n, np.uint8) for n in range(16)])
    shown = strip(clip)
    assert shown.shape == (4, 8 * 4 + 7, 3)
    assert (shown[0, 0, 0], shown[0, -1, 0]) == (0, 15)
    assert strip(clip[:3]).shape == (4, 3 * 4 + 2, 3)


@pytest.mark.parametrize(
    ("world", "fields", "message"),
    [
        ("default", {"tasks": ("paint",)}, "no task paint"),
        ("default", {"tasks": ("kind", "kind")}, "each once"),
        ("default", {"cases": 0}, "at least 1"),
        ("default", {"seed": -1}, "the seed"),
        ("easy", {}, "no clips of two shapes"),
    ],
)
def test_wrong_settings_are_refused(world: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        config(world, **fields)
