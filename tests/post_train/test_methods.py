"""Every method in the trainer: what moves, what keeps every bit, exact resume, bad configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neounify.checkpoint.names import stream_of
from neounify.errors import CheckpointError, ConfigError
from neounify.lora.layers import HALVES, weight_name
from neounify.pipeline import load
from neounify.post_train.distill import Mopd, Trajectory
from neounify.post_train.grpo import FlowGrpo
from neounify.post_train.policy import GuidedImages
from neounify.post_train.rewards import RewardFailure
from neounify.train.loop import Trainer
from neounify.train.method import TrainingStopped
from neounify.train.recipe import Recipe
from neounify.train.state import saved_states
from support.rewards import CALLS
from train.test_trainer import recipe, trainer

PROMPTS = {"categories": {"single_object": 1.0, "edit": 1.0}, "width": 32, "height": 32}
GROUPS = {
    "prompts": PROMPTS,
    "prompts_per_iteration": 4,
    "group": 3,
    "sampler": {"steps": 3},
    "sheet_every": 0,
    "rewards": [{"kind": "program", "name": "support.rewards:redness"}],
}
PAIRS = {"prompts": PROMPTS, "prompts_per_step": 3}
METHODS: dict[str, dict[str, Any]] = {
    "flow-grpo": {**GROUPS, "window": 1, "guard": True, "kl": 0.1, "updates": 2},
    "nft": {**GROUPS, "kl": 0.1, "updates": 2, "decay_rate": 0.2},
    "dpo": {**GROUPS, "beta": 100.0},
    "trajectory": {**PAIRS, "student": {"steps": 2}, "teacher_steps": 2},
    "dmd2": {**PAIRS, "student": {"steps": 2}, "fake_steps": 2, "ida": 0.1},
}
STEPS = 6
BASE: list[Path] = []
"""The folder of a small model with fresh weights."""


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    trainer(folder).export(folder / "model")
    BASE[:] = [folder / "model"]
    return BASE[0]


def described(kind: str, method: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    fields = {"freeze": ["und", "shared"], **stage}
    if "lora" in fields:
        del fields["freeze"]
    one = {
        "name": "post",
        "steps": STEPS,
        "packs_per_step": 2,
        "data": [],
        "save_every": 1,
        "method": {"kind": kind, **METHODS.get(kind, {}), **(method or {})},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        **fields,
    }
    model = {"checkpoint": str(BASE[0])}
    return recipe(model=model, defaults={"log_every": 1, "ema": 0.5}, stages=[one], keep=99)


def run(folder: Path, kind: str, method: dict[str, Any] | None = None, **stage: Any) -> Trainer:
    training = trainer(folder, described(kind, method, **stage))
    training.run()
    return training


def state_tensors(folder: Path, step: int) -> dict[str, Tensor]:
    from neounify.train.state import load_state

    tensors, _ = load_state(folder / "states" / f"step-{step:08d}")
    return {f"{file}.{n}": t for file, named in tensors.items() for n, t in named.items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "per_second", "left", "gib", "memory", "matmul", "flops", "share")
    return [
        {k: v for k, v in line.items() if not any(part in k for part in timed)} for line in lines
    ]


LORA = {"rank": 2, "streams": ["gen"]}


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "lora"])
@pytest.mark.parametrize("kind", METHODS)
def test_what_is_frozen_keeps_every_bit(tmp_path: Path, kind: str, lora: Any) -> None:
    stage = {} if lora is None else {"lora": lora}
    training = trainer(tmp_path, described(kind, **stage))
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    training.run(stop_after=2)
    moved = set()
    for name, parameter in training.model.named_parameters():
        is_trained = name.endswith(HALVES) if lora else stream_of(weight_name(name)) == "gen"
        if name in before and not is_trained:
            assert torch.equal(parameter, before[name]), name
        elif name not in before or not torch.equal(parameter, before[name]):
            moved.add(name)
    assert len(moved) > 3


@pytest.mark.parametrize("kind", METHODS)
def test_resuming_is_exact_to_the_bit(tmp_path: Path, kind: str) -> None:
    run(tmp_path / "whole", kind)
    for stop in (1, 2, 3):
        folder = tmp_path / f"stopped{stop}"
        trainer(folder, described(kind)).run(stop_after=stop)
        again = trainer(folder, described(kind))
        again.resume(saved_states(again.states)[-1])
        again.run()
        whole, cut = (state_tensors(f, STEPS) for f in (tmp_path / "whole", folder))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
        assert metrics(folder) == metrics(tmp_path / "whole")


def test_a_student_carries_its_own_sampling(tmp_path: Path) -> None:
    run(tmp_path, "trajectory")
    sampling = load(tmp_path / "model").config.sampling
    assert (sampling.steps, sampling.guidance, sampling.image_guidance) == (2, 1.0, 1.0)


def test_a_resume_that_saves_again_at_once_keeps_the_rollouts(tmp_path: Path) -> None:
    run(tmp_path / "whole", "flow-grpo")
    for _ in range(2):  # the second run takes no step, and saves
        again = trainer(tmp_path / "cut", described("flow-grpo"))
        if saved_states(again.states):
            again.resume(saved_states(again.states)[-1])
        again.run(stop_after=1)
    again = trainer(tmp_path / "cut", described("flow-grpo"))
    again.resume(saved_states(again.states)[-1])
    again.run()
    whole, cut = (state_tensors(tmp_path / name, STEPS) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_in_bfloat16_the_first_update_has_a_ratio_of_one(tmp_path: Path) -> None:
    for updates in (1, 2):
        folder = tmp_path / str(updates)
        run(folder, "flow-grpo", {"clip": 1e-7, "updates": updates}, precision="bfloat16", steps=2)
        first, second = metrics(folder)
        assert (first["ratio"], first["clipped"]) == (1.0, 0.0)
        assert (second["ratio"] == 1.0) == (updates == 1)


# --- distillation ---


def built(folder: Path, kind: str, method: dict[str, Any] | None = None) -> Any:
    training = trainer(folder, described(kind, method))
    stage = training.recipe.stages[0]
    for name, parameter in training.model.named_parameters():
        parameter.requires_grad_(stream_of(name) == "gen")
    return stage.method.build(training._context(stage))


def test_a_teacher_that_equals_its_student_has_nothing_to_teach(tmp_path: Path) -> None:
    same = {"teacher": {"guidance": 1.0, "edit_guidance": 1.0}, "teacher_steps": 1}
    method: Trajectory = built(tmp_path, "trajectory", same)
    with torch.no_grad():
        for place, cases in enumerate(method.cases(0, 4)):
            states = method.states(cases, 0, place)
            images = GuidedImages(method.model, states.grid, states.prefixes, states.guidance)
            clean = images.clean(method.model, states.z, states.t)
            torch.testing.assert_close(clean, states.target, atol=1e-5, rtol=1e-5)


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints by capability: the base model, and one with another image head."""
    expert = trainer(tmp_path / "experts", described("trajectory"))
    with torch.no_grad():
        expert.model.get_parameter("image_head.linear2.weight").mul_(1.5)
    expert.export(tmp_path / "editor")
    return {"single_object": BASE[0], "edit": tmp_path / "editor"}


def merging(experts: dict[str, Path]) -> dict[str, Any]:
    return {
        **PAIRS,
        "prompts_per_step": 6,
        "teachers": {name: str(path) for name, path in experts.items()},
        "sampler": {"steps": 4, "guidance": 4.0, "edit_guidance": 1.0},
    }


def test_an_expert_is_asked_for_its_own_capability_only(
    tmp_path: Path, experts: dict[str, Path]
) -> None:
    method: Mopd = built(tmp_path, "mopd", merging(experts))
    asked = dict.fromkeys(experts, 0)
    for name, teacher in method.teachers.items():

        def count(_: Any, inputs: Any, __: Any, name: str = name) -> None:
            asked[name] += inputs[0].shape[0]

        teacher.image_head.register_forward_hook(count)
    [painted, edited] = sorted(method.cases(0, 6), key=lambda cases: bool(cases[0].images))
    with torch.no_grad():
        states = method.states(painted, 0, 0)
        assert asked["edit"] == 0
        tokens = states.grid.length
        # Both guidance branches of each painted image.
        assert asked["single_object"] == 2 * tokens * len(painted)
        method.states(edited, 0, 1)
    assert asked == {"single_object": 2 * tokens * len(painted), "edit": tokens * len(edited)}
    images = GuidedImages(method.model, states.grid, states.prefixes, states.guidance)
    clean = images.clean(method.model, states.z, states.t)
    torch.testing.assert_close(clean, states.target, atol=1e-5, rtol=1e-5)  # teacher = student


def test_merging_experts_runs_and_resumes(tmp_path: Path, experts: dict[str, Path]) -> None:
    method = merging(experts)
    run(tmp_path / "whole", "mopd", method, steps=3)
    trainer(tmp_path / "cut", described("mopd", method, steps=3)).run(stop_after=2)
    again = trainer(tmp_path / "cut", described("mopd", method, steps=3))
    again.resume(saved_states(again.states)[-1])
    again.run()
    whole, cut = (state_tensors(tmp_path / name, 3) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_expert_with_another_understanding_stream(
    tmp_path: Path, experts: dict[str, Path]
) -> None:
    expert = trainer(tmp_path / "made", described("trajectory"))
    with torch.no_grad():
        expert.model.embed_tokens.weight.add_(1)
    expert.export(tmp_path / "foreign")
    with pytest.raises(ConfigError, match="another understanding stream"):
        built(tmp_path, "mopd", merging({**experts, "edit": tmp_path / "foreign"}))


# --- rewards in a run ---


def test_a_run_without_rewards_stops(tmp_path: Path) -> None:
    rewards = [{"kind": "program", "name": "support.rewards:none"}]
    with pytest.raises(RewardFailure, match="12 of 12 images have no reward"):
        run(tmp_path, "nft", {"rewards": rewards})


def test_a_policy_that_collapses_stops_and_names_the_last_good_state(tmp_path: Path) -> None:
    CALLS["falling"] = 0
    rewards = [{"kind": "program", "name": "support.rewards:falling"}]
    with pytest.raises(TrainingStopped, match=r"last good state is step-0000000\d") as error:
        run(tmp_path, "dpo", {"rewards": rewards}, steps=40)
    assert "method.kl" in str(error.value)


def test_windows(tmp_path: Path) -> None:
    method: FlowGrpo = built(tmp_path, "flow-grpo", {"sampler": {"steps": 10}, "window": 2})
    windows = {tuple(method.window(i)) for i in range(60)}
    assert windows == {(0, 1), (1, 2), (2, 3), (3, 4)}
    sliding = {"sampler": {"steps": 5}, "window": 2, "window_start": "sliding", "window_every": 3}
    method = built(tmp_path, "flow-grpo", sliding)
    assert [method.window(i).start for i in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0]
    method = built(tmp_path, "flow-grpo", {"sampler": {"steps": 5}, "window": None})
    assert method.window(7) == range(4)


# --- configs that cannot work ---


@pytest.mark.parametrize(
    ("kind", "method", "stage", "message"),
    [
        ("nft", {"group": 1}, {}, "group: must be .* 2"),
        ("flow-grpo", {"window": 3}, {}, "window must be at most 2 of 3 steps"),
        (
            "flow-grpo",
            {"sampler": {"guidance": 4.0}},
            {},
            "must be 1, got 4.0",
        ),
        ("flow-grpo", {"eta": 2.0}, {}, "eta of cps steps must be from 0 to 1"),
        ("flow-grpo", {"step_kind": "ode"}, {}, "needs random steps"),
        (
            "trajectory",
            {"student": {"steps": 2, "guidance": 4.0}},
            {},
            "student.guidance .* got 4.0",
        ),
        ("trajectory", {"student": {}}, {}, "give the number of steps"),
        ("dmd2", {"min_tau": 0.99}, {}, "min_tau and max_tau"),
        ("mopd", {}, {}, "name a checkpoint for each capability"),
        ("mopd", {"teachers": {"edit": "x"}, "prompts": PROMPTS}, {}, "none for prompts of single"),
        ("nft", {}, {"freeze": ["gen"]}, "understanding stream must be frozen"),
        ("nft", {}, {"lora": {"rank": 2, "streams": ["und", "gen"]}}, "lora.streams"),
        ("nft", {}, {"lora": {**LORA, "dropout": 0.1}}, "lora.dropout must be 0, got 0.1"),
        ("nft", {"sampler": {"guidance": None}}, {}, "must be 1, got None"),
        ("nft", {}, {"data": [{"kind": "scenes"}]}, "give the stage data = "),
        ("nft", {"prompts": {"kind": "text"}}, {}, "need a path"),
        ("nft", {"rewards": [{"kind": "http"}]}, {}, "needs url"),
        ("nft", {"rewards": []}, {}, "needs at least one reward"),
        ("nft", {"prompts": {**PROMPTS, "width": 1600000}}, {}, "width"),
    ],
)
def test_recipes_that_cannot_work(
    kind: str, method: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        described(kind, method, **stage)


def test_a_state_of_another_shape(tmp_path: Path) -> None:
    trainer(tmp_path, described("nft")).run(stop_after=2)
    again = trainer(tmp_path, described("nft", {"group": 4}))
    again.resume(saved_states(again.states)[-2])
    with pytest.raises(CheckpointError, match="the state's rollouts do not fit"):
        again.run()


# --- the doctor ---


def findings(folder: Path, kind: str, method: dict[str, Any] | None = None) -> dict[str, Any]:
    training = trainer(folder, described(kind, method))
    stage = training.recipe.stages[0]
    context = training._context(stage)
    return {finding.name: finding for finding in stage.method.examine(context, 20)}


@pytest.mark.parametrize("kind", ["trajectory", "dmd2"])
def test_the_doctor_distils_one_batch(tmp_path: Path, kind: str) -> None:
    result = findings(tmp_path, kind)
    assert result["gradients"].good
    if kind == "trajectory":
        assert result["distillation"].good, result


def test_the_doctor_finds_a_teacher_that_equals_its_student(tmp_path: Path) -> None:
    same = {"teacher": {"guidance": 1.0, "edit_guidance": 1.0}, "teacher_steps": 1}
    result = findings(tmp_path, "trajectory", same)
    assert "equals its student" in result["distillation"].advice


def test_the_doctor_wants_rewards_that_differ(tmp_path: Path) -> None:
    alike = {"rewards": [{"kind": "program", "name": "support.rewards:alike"}]}
    assert findings(tmp_path / "a", "nft", alike)["rewards"].good is False
    result = findings(tmp_path / "b", "nft", {"kl": 0.0})
    assert result["gradients"].good
    assert result["learning"].good is not None
