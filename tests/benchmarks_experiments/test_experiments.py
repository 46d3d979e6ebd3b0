"""Every experiment from end to end, with subjects whose scores are known and with toy models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.experiments import joint, noise, thinking
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.bench import Bench, outcomes
from benchmarks.experiments.training import JOINT, KINDS, Training, recipes, train
from PIL import Image

from neounify.config.presets import SCENES
from neounify.data.sample import DataError
from neounify.errors import ConfigError
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline
from neounify.scenes.bench import BenchConfig, Painting
from neounify.scenes.bench.subject import Side
from neounify.scenes.world import render, scene_config
from neounify.text import byte_tokenizer
from neounify.train.loop import Trainer
from support.oracle import Oracle

CASES = 4
BENCH = Bench(world="easy", cases=CASES, steps=2)
TINY = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "flow_head_width": 32,
}
TRAINING = Training(
    samples=12,
    per_step=4,
    changes=TINY,
    tokenizer_samples=50,
    compile=False,
    precision="float32",
    workers=0,
)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread; texts end early, as an untrained model never ends them; few samples measured."""
    for name in ("MAX_ANSWER_TOKENS", "MAX_THOUGHT_TOKENS"):
        monkeypatch.setattr(f"neounify.scenes.bench.subject.{name}", 4)
    monkeypatch.setattr("benchmarks.experiments.training.MEASURED", 40)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> Pipeline:
    """Untrained; images of 64 pixels are 16 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NeoUnify(SCENES.replace(**TINY)).requires_grad_(False).eval()
        return Pipeline(model, byte_tokenizer())


@pytest.fixture
def folder(small: Pipeline, tmp_path: Path) -> Path:
    small.save(tmp_path / "toy")
    return tmp_path / "toy"


def oracle(side: int = 64) -> Oracle:
    world = replace(scene_config("easy"), side=side)
    return Oracle(BenchConfig(world=world, cases=CASES))


class Forgetful(Oracle):
    """Paints one background image unless it thinks; the thoughts of odd cases are wrong."""

    def paint(
        self, prompts: Sequence[str], side: Side, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        generated = super().paint(prompts, side, seeds, think=think)
        if not think:
            empty = render(replace(self.scenes[prompts[0]], objects=()), self._config.world)
            return [replace(item, image=empty) for item in generated]
        return [
            replace(item, thought="?") if number % 2 else item
            for number, item in enumerate(generated)
        ]


# --- parts ---


def test_only_wanted_categories_are_measured() -> None:
    config = BENCH.config(scene_config("easy"), ("paint", "edit"))
    assert set(outcomes(oracle(), config, ("edit", "paint/colours"))) == {"edit", "paint/colours"}
    with pytest.raises(DataError, match="paint/size"):
        outcomes(oracle(), config, ("paint/size",))


def test_recipes_differ_in_their_data_and_steps_alone() -> None:
    tables = recipes(TRAINING, "easy", 3)
    assert tuple(tables) == KINDS
    stages = {kind: table["stages"][0] for kind, table in tables.items()}
    assert stages["understanding"]["data"] + stages["generation"]["data"] == stages[JOINT]["data"]
    assert [stages[kind]["steps"] for kind in KINDS] == [3, 3, 6]
    for stage in stages.values():
        for name in ("name", "steps", "data"):
            del stage[name]
        del stage["method"]["tokens_per_pack"]
        stage["schedule"]["warmup"] = 0
    assert stages["understanding"] == stages["generation"] == stages[JOINT]
    assert len({table["seed"] for table in tables.values()}) == 1


def test_training_out_of_range_is_an_error() -> None:
    with pytest.raises(DataError, match="per step"):
        Training(samples=3, per_step=4)


# --- joint ---


@pytest.mark.slow
def test_joint_trains_measures_and_takes_finished_runs_again(tmp_path: Path) -> None:
    joint.experiment(TRAINING, BENCH, 2, tmp_path)
    first = read(tmp_path)
    runs = first["runs"]
    assert [(run["kind"], run["seed"]) for run in runs] == [(k, s) for s in (0, 1) for k in KINDS]
    for und, gen, both in (runs[:3], runs[3:]):
        assert und["generation_samples"] == gen["understanding_samples"] == 0
        assert both["understanding_samples"] == pytest.approx(und["understanding_samples"], abs=8)
        assert both["generation_samples"] == pytest.approx(gen["generation_samples"], abs=8)
        assert both["steps"] == 2 * und["steps"] == 2 * gen["steps"]
        assert not both["reused"]
    rows = {row["category"]: row for row in first["differences"]}
    assert {"caption", "edit", "vqa/count", "vqa, all", *joint.PAINTED} <= set(rows)
    assert rows["edit"]["joint"]["n"] == 2 * CASES
    assert len(rows["edit"]["difference_by_seed"]) == 2
    assert "joint - alone" in (tmp_path / "report.md").read_text()

    joint.experiment(TRAINING, BENCH, 1, tmp_path)
    again = read(tmp_path)
    assert all(run["reused"] for run in again["runs"])
    scores = [run["scores"] for run in runs[:3]]
    assert [run["scores"] for run in again["runs"]] == scores


def test_other_settings_train_anew(tmp_path: Path) -> None:
    runs = []
    for training in (TRAINING, replace(TRAINING, learning_rate=1e-3), TRAINING):
        table = recipes(training, "easy", 0)["generation"]
        runs.append(train("generation", table, tmp_path))
    assert [run.reused for run in runs] == [False, False, True]
    assert runs[0].folder == runs[2].folder != runs[1].folder
    assert runs[0].to_json() | {"reused": True} == runs[2].to_json()


def test_a_stopped_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = recipes(TRAINING, "easy", 0)["understanding"]
    whole = Trainer.run

    def stopped(trainer: Trainer) -> None:
        whole(trainer, stop_after=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        train("understanding", table, tmp_path)
    monkeypatch.setattr(Trainer, "run", whole)
    resumed = train("understanding", table, tmp_path)
    assert (resumed.reused, resumed.counts["steps"]) == (False, 3)
    assert (
        resumed.counts["understanding_samples"]
        == train("understanding", table, tmp_path / "b").counts["understanding_samples"]
    )
    lines = (resumed.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3]


# --- thinking ---


def test_thinking_counts_pairs_and_splits_by_the_thought() -> None:
    *single, whole = thinking.compare(Forgetful(BenchConfig(**asked())), BENCH)
    assert [item.category for item in single] == list(thinking.CATEGORIES)
    for item in single:
        assert (item.paired.first_only, item.paired.second_only) == (CASES, 0)
        assert item.thoughts.correct == CASES / 2
        assert item.after_right is not None
        assert item.after_right.first.value == 1
        assert item.after_right.second.value == 0
    assert whole.paired.number == CASES * len(single)
    assert whole.paired.difference.value == 1


def test_an_oracle_thinks_right_and_gains_nothing() -> None:
    whole = thinking.compare(oracle(), BENCH)[-1]
    assert whole.paired.difference.value == 0
    assert whole.after_wrong is None
    assert "all four" in thinking.markdown([whole])


def test_thinking_as_a_command(folder: Path, tmp_path: Path) -> None:
    main(["thinking", "--model", str(folder), *few(), "--output", str(tmp_path / "out")])
    report = read(tmp_path / "out")
    assert len(report["categories"]) == len(thinking.CATEGORIES) + 1
    assert report["model"]["fingerprint"]
    assert report["sampling"]["steps"] == 2
    assert {"torch", "machine", "seconds"} <= set(report)


# --- noise ---


def test_fixed_noise_keeps_weights_and_the_sigma_of_the_trained_size(small: Pipeline) -> None:
    fixed = noise.with_fixed_noise(small, 64)
    assert fixed.config.flow.noise_scale == small.config.flow.noise_scale == 3.0
    assert noise.with_fixed_noise(small, 128).config.flow.noise_scale == 6.0
    same = {"width": 64, "height": 64, "steps": 2, "seed": 1}
    first, second = (p.generate("a star", **same).pixels for p in (small, fixed))  # type: ignore[arg-type]
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="nothing to compare"):
        noise.with_fixed_noise(fixed, 64)


@pytest.mark.parametrize("side", [64, 96, 128])
def test_an_oracle_is_right_at_every_side(side: int) -> None:
    flow = SCENES.flow
    sized = noise.compare((oracle(side),) * 2, (flow, flow), BENCH, [side], token_size=16)
    assert [item.paired.both for item in sized] == [CASES] * len(noise.CATEGORIES)
    assert sized[0].sigmas[0] == pytest.approx(3 * side / 64)


def test_noise_as_a_command(folder: Path, tmp_path: Path) -> None:
    main(["noise", "--model", str(folder), *few(), "--output", str(tmp_path / "out")])
    report = read(tmp_path / "out")
    assert report["trained_side"] == 64
    sigmas = {item["side"]: item["sigmas"] for item in report["sizes"]}
    assert sigmas == {64: [3.0, 3.0], 96: [4.5, 3.0], 128: [6.0, 3.0]}
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 6 * 128


def test_an_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: "):
        main(["thinking", "--world", "none", "--output", str(tmp_path)])


def asked() -> dict[str, Any]:
    return {"world": scene_config("easy"), "cases": CASES}


def few() -> list[str]:
    return ["--world", "easy", "--cases", "2", "--steps", "2"]


def read(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())
