"""The seam between loop and method: two models with separate rates and turns, and a state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from neounify.errors import CheckpointError, ConfigError
from neounify.pipeline import load
from neounify.train.export import export_state
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.method import METHODS, StageContext, TrainingStopped, repeatable
from neounify.train.recipe import Recipe, StageRecipe
from neounify.train.setup import StageSources, build_setup
from neounify.train.state import check_state, newest_whole_state, saved_states
from support.distillation import BUILT, TARGET, Distillation, DistillationConfig
from train.test_trainer import recipe

STEPS = 9


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line in the table is all that a method needs."""
    monkeypatch.setitem(METHODS, "distillation", TARGET)


def one_stage(method: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    table = {"kind": "distillation", **(method or {})}
    first = {"name": "distil", "steps": STEPS, "packs_per_step": 2, "method": table, "data": []}
    return recipe(stages=[{**first, **stage}, {"name": "scenes", "steps": 1}])


def trainer(folder: Path, described: Recipe) -> Trainer:
    setup = build_setup(described, torch.device("cpu"), folder)
    return Trainer(described, setup, folder, Log(folder, Console(quiet=True), tensorboard=False))


def run(folder: Path, stop_after: int | None = None, **method: Any) -> Trainer:
    training = trainer(folder, one_stage(method))
    training.run(stop_after=stop_after, only=["distil"])
    return training


def resumed(folder: Path, described: Recipe | None = None) -> Trainer:
    training = trainer(folder, described or one_stage())
    training.resume(saved_states(training.states)[-1])
    training.run(only=["distil"])
    return training


def built() -> Distillation:
    return BUILT[-1]


def results(training: Trainer) -> dict[str, Tensor]:
    models = {"model": training.model, "critic": built().critic, "teacher": built().teacher}
    named = {
        f"{prefix}.{name}": parameter.detach()
        for prefix, model in models.items()
        for name, parameter in model.named_parameters()
    }
    return {**named, "baseline": built().baseline}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in other)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def reports(folder: Path) -> Sequence[tuple[Any, ...]]:
    return [(x["step"], x.get("distillation/loss"), x["gradient_norm"]) for x in records(folder)]


# --- the recipe ---


def test_a_kind_names_its_config() -> None:
    stage = one_stage({"turn": 4, "betas": [0.5, 0.9]}).stages[0]
    assert stage.method == DistillationConfig(turn=4, betas=(0.5, 0.9))
    assert StageRecipe(name="a", steps=5, method=DistillationConfig(), data=()).data == ()


@pytest.mark.parametrize(
    ("method", "stage", "message"),
    [
        ({"kind": "other"}, {}, r"unknown method 'other'; known are supervised, .*distillation"),
        ({"kind": "distilation"}, {}, "did you mean 'distillation'"),
        ({"turn": 0}, {}, r"stages\.0\.method\.turn: must be at least 1, got 0"),
        ({"betas": [0.1]}, {}, r"stages\.0\.method\.betas\.1: Field required"),
        ({"noise_draws": 1}, {}, r'method of kind "distillation" has no noise_draws; it has kind'),
        ({}, {"tokens_per_pack": 9}, r'of kind "distillation" has no tokens_per_pack'),
        ({"turn": 99}, {}, r"stages\.0: method\.turn: 99 steps are more than the stage's"),
        ({"kind": "supervised"}, {}, "data: the method supervised needs at least one source"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_wrong_method_is_one_error_before_anything_is_loaded(
    method: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        one_stage(method, **stage)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_defaults_of_one_method_are_not_those_of_another() -> None:
    """Recipes of today give the fields of supervised training to all stages."""
    stages = [
        {"name": "distil", "steps": 5, "method": {"kind": "distillation"}},
        {"name": "sft", "steps": 5, "method": {"noise_draws": 2}},
    ]
    size: dict[str, Any] = {"tokens_per_pack": 600}
    for shared in (size, {"method": size}):
        distil, sft = recipe(defaults=shared, stages=stages).stages
        assert distil.method == DistillationConfig()
        assert (sft.method.kind, vars(sft.method)["tokens_per_pack"]) == ("supervised", 600)
    shared = {"method": {"kind": "distillation", "turn": 2}}
    first, second = recipe(
        defaults=shared, stages=[{"name": "a", "steps": 5}, {**stages[1], "method": {"turn": 4}}]
    ).stages
    assert (first.method, second.method) == (
        DistillationConfig(turn=2),
        DistillationConfig(turn=4),
    )


# --- the loop ---


@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_a_method_of_two_models_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    expected = results(run(tmp_path / "whole"))
    run(tmp_path / "cut", stop_after=stop)
    actual = results(resumed(tmp_path / "cut"))
    assert same(actual, expected)
    assert reports(tmp_path / "cut") == reports(tmp_path / "whole")
    assert built().steps_taken == 6
    assert not torch.equal(actual["teacher.weight"], actual["model.embed_tokens.weight"])


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import train.test_method as t
from neounify.train.method import METHODS
from neounify.train.state import saved_states
METHODS["distillation"] = t.TARGET
one = t.trainer(Path({folder!r}), t.one_stage(steps=300, save_every=7))
if saved_states(one.states):
    one.resume(saved_states(one.states)[-1])
one.run(only=["distil"])
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_costs_a_method_nothing(tmp_path: Path) -> None:
    for name, kills in (("whole", 0), ("killed", 3)):
        folder, script = tmp_path / name, tmp_path / f"{name}.py"
        tests = str(Path(__file__).parents[1])
        script.write_text(SCRIPT.format(tests=tests, folder=str(folder)))
        log = folder / "log.jsonl"
        for _ in range(kills):
            before = len(log.read_text()) if log.exists() else 0
            process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                if log.exists() and len(log.read_text()) > before + 15000:
                    break
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert reports(killed) == reports(whole)
    for file in ("model", "ema", "optimizer", "method"):
        one, other = (saved_states(f / "states")[-1] for f in (killed, whole))
        name = f"{file}.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_optimizers_move_in_their_turns_at_their_own_rates(tmp_path: Path) -> None:
    training = run(tmp_path)
    student, critic = built().student_set, built().critic_set
    assert {int(state["step"]) for state in student.members[0].state.values()} == {3}
    assert {int(state["step"]) for state in critic.members[0].state.values()} == {3}
    assert student.members[0].param_groups[0]["lr"] == pytest.approx(2e-3 * 0.5)
    assert critic.members[0].param_groups[0]["lr"] == pytest.approx(4e-2 / 8)
    facts = json.loads((saved_states(training.states)[-1] / "state.json").read_text())
    assert facts["ema_updates"] == 3  # the EMA follows the student alone
    names = [name for member in facts["optimizer_parameters"] for name in member]
    assert names == ["embed_tokens.weight", "critic.weight", "critic.bias"]
    assert facts["position"] == {"next": 18}
    progress = training.progress
    assert (progress.tokens, progress.samples, progress.step) == (9 * 16, 18, 9)
    last = records(tmp_path)[-1]
    assert last["learning_rate/model"] == 2e-3
    assert last["gradient_norm/model"] == last["gradient_norm"] > 0
    assert "learning_rate/critic" not in last  # it is not its turn
    critics = [r for r in records(tmp_path) if "learning_rate/critic" in r][-1]
    assert critics["learning_rate/critic"] == pytest.approx(4e-2 / 8)
    assert critics["gradient_norm/critic"] > 0


def test_a_step_in_which_nothing_moves_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    before = results(run(tmp_path / "a", stop_after=3))
    training = run(tmp_path / "b", stop_after=4)  # step 3 begins a turn: no set is active
    assert same(results(training), before)
    assert training.progress.step == 4
    assert training.progress.nonfinite == 0
    assert built().ended == [False, True, True, False]
    assert records(tmp_path / "b")[-1]["gradient_norm"] == 0.0


def test_a_step_that_is_not_finite_changes_neither_model(tmp_path: Path) -> None:
    before = results(run(tmp_path / "plain", stop_after=4))
    training = run(tmp_path / "broken", stop_after=5, broken_step=4)
    assert same(results(training), before)
    assert training.progress.nonfinite == 1
    listed = json.loads((tmp_path / "broken" / "nonfinite.jsonl").read_text())
    assert listed["samples"] == ["prompt-9", "prompt-10"]


@pytest.mark.parametrize(("prompts", "steps"), [(8, 4), (7, 4), (6, 3)])
def test_the_stage_ends_with_its_batches(
    tmp_path: Path, prompts: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Log, "warn", lambda _, message: said.append(message))
    described = one_stage({"prompts": prompts})
    training = trainer(tmp_path, described)
    training.run()
    ended = f"stage distil: the batches of its method (distillation) ended after {steps} of 9 steps"
    assert [ended in line for line in said].count(True) == 1
    assert training.progress.step == steps + 1  # and one of the next stage
    assert [x["step"] for x in records(tmp_path)] == [*range(1, steps + 2)]
    assert (tmp_path / "model").is_dir()
    assert built().closed


def test_a_stage_that_ended_early_is_finished_for_a_resume(tmp_path: Path) -> None:
    described = one_stage({"prompts": 4})
    trainer(tmp_path, described).run(only=["distil"])
    again = trainer(tmp_path, described)
    again.resume(saved_states(again.states)[-1])
    again.run(only=["scenes"])
    assert again.progress.step == 3


def test_a_method_may_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="the policy has collapsed"):
        run(tmp_path, collapse_step=5)
    assert built().closed
    assert [path.name for path in saved_states(tmp_path / "states")] == ["step-00000004"]


def test_metrics_warnings_files_and_the_checkpoints_defaults_are_the_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Log, "warn", lambda _, message: said.append(message))
    run(tmp_path)
    assert len(said) == 1
    assert said[0].endswith("at step 5: lower turn")
    sheets = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert sheets == [f"taken-{n:04d}.txt" for n in range(7)]
    assert load(tmp_path / "model").model.config.sampling.steps == 3


def test_sampling_that_a_stage_sets_is_in_every_export_and_in_later_stages(tmp_path: Path) -> None:
    described = one_stage(steps=4)
    trainer(tmp_path / "run", described).run(stop_after=2)
    again = trainer(tmp_path / "run", described)
    state = saved_states(again.states)[-1]
    export_state(described, again.folder, state, tmp_path / "exported", torch.float32)
    assert load(tmp_path / "exported").model.config.sampling.steps == 3
    resumed(tmp_path / "run", described).run()
    assert load(tmp_path / "run" / "model").model.config.sampling.steps == 3
    last = trainer(tmp_path / "run", described)
    last.resume(saved_states(last.states)[-1])  # of the second stage
    assert last.model.config.sampling.steps == 3


def test_a_method_has_checks_of_its_own_or_says_that_it_has_none(tmp_path: Path) -> None:
    described = one_stage()
    stage = described.stages[0]
    setup = build_setup(described, torch.device("cpu"), tmp_path)
    context = StageContext(
        recipe=described, stage=stage, setup=setup, sources=StageSources(described), folder=tmp_path
    )
    assert isinstance(stage.method, DistillationConfig)
    (finding,) = stage.method.examine(context, 5)
    assert finding.what == "distils distil in 5 s"
    (default,) = super(DistillationConfig, stage.method).examine(context, 5)
    assert default.good is None
    assert default.what == "the method distillation has no checks of its own"


# --- states ---


def test_a_state_of_another_method_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop_after=2)
    supervised = one_stage({"kind": "supervised"}, data=[{"world": "easy"}])
    with pytest.raises(CheckpointError, match=r"'distillation', the stage has 'supervised'"):
        resumed(tmp_path, supervised)


def test_damage_to_a_methods_tensors_is_found(tmp_path: Path) -> None:
    training = run(tmp_path, stop_after=6)
    first, second = saved_states(training.states)
    file = second / "method.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"method\.safetensors is not as it was"):
        check_state(second)
    passed_over: list[str] = []
    assert newest_whole_state(training.states, passed_over.append) == first
    assert len(passed_over) == 1


def test_a_gpu_trains_with_repeatable_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with repeatable(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with repeatable(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


def test_repeatable_kernels_end_as_they_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with repeatable(torch.device("cuda")):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
