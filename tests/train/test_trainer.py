"""The loop: a kill at any moment costs nothing, damage is met with a word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from neounify.errors import CheckpointError, ConfigError
from neounify.pipeline import load
from neounify.train.log import Log
from neounify.train.loop import Trainer, TrainingStopped
from neounify.train.recipe import Recipe, read_recipe, recipe_from_table
from neounify.train.setup import build_setup
from neounify.train.state import save_state, saved_states
from support.models import TINY_CHANGES


def recipe(**changes: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": "test",
        "workers": 0,
        "model": {"preset": "scenes", "changes": TINY_CHANGES, "tokenizer": {"samples": 50}},
        "defaults": {
            "method": {"tokens_per_pack": 600},
            "log_every": 1,
            "save_every": 4,
            "ema": 0.9,
            "optimizer": {"name": "muon", "learning_rate": 1e-3},
            "data": [{"kind": "scenes", "world": "easy"}],
        },
        "stages": [
            {"name": "read", "steps": 5, "freeze": ["gen"]},
            {"name": "both", "steps": 7, "packs_per_step": 2},
        ],
    }
    return recipe_from_table({**table, **changes})


def data(**source: Any) -> dict[str, Any]:
    return {"stages": [{"name": "a", "steps": 1, "data": [source]}]}


def trainer(folder: Path, parsed: Recipe | None = None) -> Trainer:
    parsed = parsed or recipe()
    log = Log(folder, Console(quiet=True), tensorboard=False)
    return Trainer(parsed, build_setup(parsed, torch.device("cpu"), folder), folder, log)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(x["step"], x.get("text/loss", 0.0), x.get("image/loss", 0.0)) for x in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder / "model").model.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).run()
    return folder


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_resuming_is_exact_to_the_bit(whole: Path, tmp_path: Path, stop: int) -> None:
    trainer(tmp_path).run(stop_after=stop)
    again = trainer(tmp_path)
    again.resume(saved_states(again.states)[-1])
    again.run()
    assert losses(tmp_path) == losses(whole)
    mine, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_stage_by_stage_is_the_same_as_in_one_go(whole: Path, tmp_path: Path) -> None:
    trainer(tmp_path).run(only=["read"])
    again = trainer(tmp_path)
    again.resume(saved_states(again.states)[-1])
    again.run(only=["both"])
    assert losses(tmp_path) == losses(whole)
    mine, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match="read is trained already"):
        again.run(only=["read"])


def test_a_checkpoint_may_start_with_any_stage(whole: Path, tmp_path: Path) -> None:
    parsed = recipe(model={"checkpoint": str(whole / "model")})
    trainer(tmp_path, parsed).run(only=["both"])
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_stages_that_would_be_skipped_are_named(tmp_path: Path) -> None:
    third = {"name": "more", "steps": 1}
    parsed = recipe(stages=[{"name": "read", "steps": 5}, {"name": "both", "steps": 7}, third])
    for names, message in (
        (["both"], "both starts from the result of read, and the run has 0 of 5 steps of read"),
        (["read", "more"], "between the stages named, both is left out"),
        (["reed"], "no stage reed; the recipe has"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path / names[0], parsed).run(only=names)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
import test_trainer as t
from neounify.train.state import saved_states
import torch
one = t.trainer(Path({folder!r}), t.recipe(workers=1))
if saved_states(one.states):
    one.resume(saved_states(one.states)[-1])
if __name__ == "__main__":
    one.run()
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    here = Path(__file__).parent
    runs = {}
    for name, kills in (("whole", 0), ("killed", 3)):
        folder = tmp_path / name
        script = tmp_path / f"{name}.py"
        script.write_text(SCRIPT.format(tests=str(here.parent), here=str(here), folder=str(folder)))
        for _ in range(kills):
            process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
            before = len((folder / "log.jsonl").read_text()) if folder.exists() else 0
            deadline = time.monotonic() + 60
            # Some steps further on, wherever the run then is: in a step, saving, or between.
            while time.monotonic() < deadline and process.poll() is None:
                log = folder / "log.jsonl"
                if log.exists() and len(log.read_text()) > before + 2500:
                    break
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run([sys.executable, str(script)], check=True, timeout=120)
        runs[name] = folder
    assert losses(runs["killed"]) == losses(runs["whole"])
    mine, theirs = weights(runs["killed"]), weights(runs["whole"])
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_stage_trains_only_what_is_not_frozen(tmp_path: Path) -> None:
    parsed = recipe(stages=[{"name": "read", "steps": 3, "freeze": ["gen"]}])
    run = trainer(tmp_path, parsed)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.run()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(".und." in n for n in changed)
    assert not any(".gen." in n or "image_head" in n for n in changed)


@pytest.mark.slow
def test_training_learns(tmp_path: Path) -> None:
    parsed = recipe(stages=[{"name": "a", "steps": 150, "packs_per_step": 1}])
    trainer(tmp_path, parsed).run()
    rows = losses(tmp_path)
    assert sum(x[1] for x in rows[-5:]) < 0.8 * sum(x[1] for x in rows[:5])
    assert sum(x[2] for x in rows[-5:]) < 0.8 * sum(x[2] for x in rows[:5])


def test_steps_that_are_not_finite_are_skipped_listed_and_end_the_run(tmp_path: Path) -> None:
    parsed = recipe(stages=[{"name": "a", "steps": 9, "max_nonfinite": 3}])
    run = trainer(tmp_path, parsed)
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = float("nan")
    before = run.model.embed_tokens.weight.detach().clone()
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        run.run()
    assert torch.equal(run.model.embed_tokens.weight, before)
    lines = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0])["samples"][0].startswith("scenes-0-")


def test_only_the_newest_states_stay(whole: Path) -> None:
    assert [p.name for p in saved_states(whole / "states")] == ["step-00000009", "step-00000012"]


def test_a_state_of_another_model_is_refused(whole: Path, tmp_path: Path) -> None:
    other = recipe(model={"preset": "scenes", "changes": {**TINY_CHANGES, "num_layers": 1}})
    with pytest.raises(CheckpointError, match="another model"):
        trainer(tmp_path, other).resume(saved_states(whole / "states")[-1])


def test_a_full_disk_leaves_the_old_state(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = whole / "states"
    names = [p.name for p in folder.iterdir()]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neounify.train.state.save_file", full)
    with pytest.raises(CheckpointError, match="earlier ones are unchanged"):
        save_state(folder, 99, {"model": {}, "ema": {}, "optimizer": {}}, {})
    assert [p.name for p in folder.iterdir()] == names


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_damaged_state_is_refused(whole: Path, tmp_path: Path, file: str) -> None:
    run = trainer(tmp_path)
    run.run(stop_after=1)
    state = saved_states(run.states)[-1]
    (state / file).write_bytes(b"{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer(tmp_path).resume(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour is not a field of a recipe; known are name, model, stages"),
        ({"stages": [{"name": "a", "stepz": 1}]}, "stepz is not .*; did you mean 'steps'"),
        ({"model": {"tokenizer": {"vocab": 9}}}, "vocab is not .*known are vocab_size, samples"),
        ({"stages": []}, "needs stages"),
        ({"stages": [{"name": "a", "steps": 0}]}, r"stages\.0\.steps: must be at least 1, got 0"),
        ({"stages": [{"name": "a", "steps": 1, "optimizer": {"lr": 1}}]}, "optimizer.lr is not"),
        ({"stages": [{"name": "a", "steps": "many"}]}, "stages.0.steps"),
        ({"model": {}}, "either a preset or a checkpoint"),
        (data(kind="jsonl"), 'data of kind "jsonl" needs a path'),
        (data(kind="shards", path="x.tar", world="easy"), 'data of kind "shards" has no world'),
        (data(path="x.jsonl"), 'data of kind "scenes" has no path'),
    ],
)
def test_wrong_recipes_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**change)


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        read_recipe(tmp_path / "bad.toml")


def test_unknown_names_to_freeze_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eyes"):
        recipe(stages=[{"name": "a", "steps": 1, "freeze": ["eyes"]}])
    dense = recipe(stages=[{"name": "a", "steps": 1, "freeze": ["experts"]}])
    with pytest.raises(ConfigError, match="experts"):
        trainer(tmp_path, dense).run()


def test_the_recipes_of_the_repository_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    assert [read_recipe(path).name for path in sorted(folder.glob("*.toml"))]
