"""Every method in the trainer: what moves, what keeps every bit, exact resume, bad configs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.checkpoint.names import stream_of
from neounify.data.sample import DataError
from neounify.errors import CheckpointError, ConfigError
from neounify.lora.layers import HALVES, weight_name
from neounify.pipeline import load
from neounify.post_train.distill import Trajectory
from neounify.post_train.dmd2 import Dmd2
from neounify.post_train.grpo import FlowGrpo
from neounify.post_train.mopd import Mopd
from neounify.post_train.policy import GuidedImages
from neounify.post_train.rewards import RewardFailure
from neounify.train.loop import Trainer
from neounify.train.method import TrainingStopped, TrainStep
from neounify.train.setup import prepare_parameters
from neounify.train.state import saved_states
from support.post_training import (
    BASE,
    LORA,
    METHODS,
    PROMPTS,
    STEPS,
    built,
    described,
    metrics,
    run,
    state_tensors,
)
from support.rewards import CALLS
from train.test_trainer import trainer


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_frozen_keeps_every_bit(tmp_path: Path, name: str, lora: bool) -> None:
    streams = METHODS[name].streams
    stage = {"lora": {**LORA, "streams": list(streams)}} if lora else {}
    training = trainer(tmp_path, described(name, **stage))
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    training.run(stop_after=2)
    trained = {*streams, "shared"} if "und" in streams else set(streams)
    moved = set()
    for parameter, value in training.model.named_parameters():
        stream = stream_of(weight_name(parameter))
        is_trained = parameter.endswith(HALVES) if lora else stream in trained
        if parameter in before and not is_trained:
            assert torch.equal(value, before[parameter]), parameter
        elif parameter not in before or not torch.equal(value, before[parameter]):
            moved.add(stream)
    assert moved >= set(streams)


@pytest.mark.parametrize("name", METHODS)
def test_resuming_is_exact_to_the_bit(tmp_path: Path, name: str) -> None:
    run(tmp_path / "whole", name)
    for stop in (1, 2, 3):
        folder = tmp_path / f"stopped{stop}"
        trainer(folder, described(name)).run(stop_after=stop)
        again = trainer(folder, described(name))
        again.resume(saved_states(again.states)[-1])
        again.run()
        whole, cut = (state_tensors(f, STEPS) for f in (tmp_path / "whole", folder))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[n], cut[n]) for n in whole)
        assert metrics(folder) == metrics(tmp_path / "whole")


def test_a_sheet_pairs_student_and_teacher(tmp_path: Path) -> None:
    for kind in ("trajectory", "dmd2"):
        folder = tmp_path / kind
        run(folder, kind, {"sheet_every": 2}, steps=3)
        sheets = sorted(path.name for path in (folder / "rollouts").iterdir())
        assert sheets == ["step-000002.png", "step-000003.png"]
        assert "step-000003" in (folder / "report.html").read_text("utf-8")


def test_a_sheet_changes_nothing_of_a_run(tmp_path: Path) -> None:
    for name, every in (("with", 1), ("without", 0)):
        run(tmp_path / name, "trajectory", {"sheet_every": every}, steps=2)
    one, other = (state_tensors(tmp_path / name, 2) for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "lora"])
def test_the_fake_starts_from_the_teacher(
    tmp_path: Path, experts: dict[str, Path], lora: bool
) -> None:
    settings = {"teacher_checkpoint": str(experts["edit"]), "ida": 0.0}
    stage = {"lora": LORA} if lora else {"freeze": ["und", "shared", "timestep"]}
    training = trainer(tmp_path / "run", described("dmd2", settings, **stage))
    one = training.recipe.stages[0]
    prepare_parameters(training.model, one, training.recipe.seed)
    method = one.method.build(training._context(one))
    assert isinstance(method, Dmd2)
    theirs = dict(load(experts["edit"], dtype="float32").model.named_parameters())
    fake, student = (dict(m.named_parameters()) for m in (method.fake.model, training.model))
    assert all(torch.equal(fake[name], theirs[name]) for name in theirs)
    head = "image_head.linear2.weight"
    assert not torch.equal(student[head], theirs[head])
    # It trains tensors of its own, those that the student trains.
    trained = {name for name, p in student.items() if p.requires_grad}
    assert {name for name, p in fake.items() if p.requires_grad} == trained
    shared = {p.data_ptr() for p in student.values()}
    assert not shared & {fake[name].data_ptr() for name in trained}


@pytest.mark.parametrize("kind", ["mopd", "trajectory", "dmd2"])
def test_teachers_are_checked_before_any_stage_is_trained(
    tmp_path: Path, experts: dict[str, Path], kind: str
) -> None:
    def training(teacher: Path) -> Trainer:
        if kind == "mopd":
            settings = {**merging(experts), "teachers": {"single_object": str(teacher)}}
        else:
            settings = {"teacher_checkpoint": str(teacher)}
        return trainer(tmp_path / "run", described(kind, settings))

    with pytest.raises(CheckpointError, match=r"missing does not exist; expected a folder"):
        training(tmp_path / "missing").run()
    config = experts["edit"] / "config.json"
    document = json.loads(config.read_text("utf-8"))
    layers = document["llm_config"]["num_hidden_layers"]
    document["llm_config"]["num_hidden_layers"] = layers + 1
    config.write_text(json.dumps(document), "utf-8")
    with pytest.raises(ConfigError, match=rf"layers\.{layers}.* absent here"):
        training(experts["edit"]).run()
    assert not list((tmp_path / "run").glob("states/*"))


def test_a_step_of_fewer_prompts_than_micro_batches(tmp_path: Path) -> None:
    whole = run(tmp_path / "one", "dmd2", {"prompts_per_step": 1}, packs_per_step=1)
    parts = run(tmp_path / "four", "dmd2", {"prompts_per_step": 1}, packs_per_step=4)
    assert parts.progress.images == whole.progress.images == STEPS


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


def test_a_teacher_that_equals_its_student_has_nothing_to_teach(tmp_path: Path) -> None:
    same = {"teacher": {"guidance": 1.0, "edit_guidance": 1.0}, "teacher_steps": 1}
    method: Trajectory = built(tmp_path, "trajectory", same)
    with torch.no_grad():
        for place, cases in enumerate(method.cases(0, 4)):
            states = method.states(cases, 0, place, range(len(cases)))
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
        "prompts": {"width": 32, "height": 32},
        "prompts_per_step": 6,
        "epoch_steps": 1,
        "sheet_every": 0,
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
    [painted], [edited] = method.cases(0, 6), method.cases(6, 6)
    with torch.no_grad():
        states = method.states(painted, 0, 0, range(6))
        assert asked["edit"] == 0
        tokens = states.grid.length
        # Both guidance branches of each painted image.
        assert asked["single_object"] == 2 * tokens * len(painted)
        method.states(edited, 0, 1, range(6))
    assert asked == {"single_object": 2 * tokens * len(painted), "edit": tokens * len(edited)}
    images = GuidedImages(method.model, states.grid, states.prefixes, states.guidance)
    clean = images.clean(method.model, states.z, states.t)
    torch.testing.assert_close(clean, states.target, atol=1e-5, rtol=1e-5)  # teacher = student


def test_epochs_take_the_capabilities_in_turn(tmp_path: Path, experts: dict[str, Path]) -> None:
    method: Mopd = built(tmp_path, "mopd", {**merging(experts), "epoch_steps": 2})
    drawn = [[c for group in method.cases(6 * step, 6) for c in group] for step in range(6)]
    categories = [{case.category for case in cases} for cases in drawn]
    assert categories == [{"single_object"}] * 2 + [{"edit"}] * 2 + [{"single_object"}] * 2
    # An epoch continues where the capability's last one ended.
    painted = [case.prompt for step in (0, 1, 4, 5) for case in drawn[step]]
    source = method.prompts.sources["single_object"]
    assert painted == [source.case(number).prompt for number in range(24)]


def test_stopping_times_move_with_the_epochs(tmp_path: Path, experts: dict[str, Path]) -> None:
    settings = {**merging(experts), "epoch_steps": 3, "sampler": {"steps": 30}}
    method: Mopd = built(tmp_path, "mopd", settings)  # 6 steps, so that I = 2
    times = [step / 30 for step in range(31)]
    for step, progress in ((0, 0), (2, 0), (3, 0.5), (5, 0.5)):
        alpha, beta = 2 + 3 * progress, 5 - 3 * progress
        stopped = method._ends(times, step, 0, 20_000).double() / 30
        # The step below a time: half a step earlier on average.
        assert float(stopped.mean()) == pytest.approx(alpha / (alpha + beta) - 0.5 / 30, abs=0.01)


def test_merging_experts_runs_and_resumes(tmp_path: Path, experts: dict[str, Path]) -> None:
    method = merging(experts)
    run(tmp_path / "whole", "mopd", {**method, "sheet_every": 2}, steps=3)
    assert len(list((tmp_path / "whole" / "rollouts").iterdir())) == 2
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


def test_the_guard_may_divide_by_the_time_of_a_step(tmp_path: Path) -> None:
    for divided in (False, True):
        settings = {
            "kl": 0.0,
            "window": 2,
            "divide_by_time": divided,
            "sampler": {"shift": 3.0, "steps": 4},
        }
        method: FlowGrpo = built(
            tmp_path / str(divided), "flow-grpo", {**settings, "window_start": "first"}
        )
        batches = list(islice(method.batches(None), 2))
        for index, batch in enumerate(batches):
            step = TrainStep(number=0, stage_step=0, batches=batches, seed=0, index=index)
            for share in batch.content.shares:
                loss = method.share_loss(share, step)
                times = share.rollout.times
                steps = [times[1] - times[0], times[2] - times[1]]
                factor = (1 / steps[0] + 1 / steps[1]) / 2 if divided else 1.0
                torch.testing.assert_close(loss, -factor * share.advantages)  # ratios are 1


def test_a_clamp_of_the_checkpoint_does_not_reach_rollouts(tmp_path: Path) -> None:
    """The solver finds x̂ in the velocity, which must not be clamped before the last step."""
    finals = []
    for t_eps in (None, 1.0):
        settings = {"window": 1, "sampler": {"steps": 4}}
        method: FlowGrpo = built(tmp_path / str(t_eps), "flow-grpo", settings)
        config = method.model.config
        method.model.config = config.replace(flow=replace(config.flow, t_eps_sampling=t_eps))
        first = next(method.batches(None))
        finals.append(first.content.shares[0].rollout.final)
    assert torch.equal(*finals)


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
        ("flow-grpo", {"guard": False, "divide_by_time": True}, {}, "belongs to guard = true"),
        ("mopd", {}, {}, "name a checkpoint for each capability"),
        ("mopd", {"teachers": {"edit": "x"}, "prompts": PROMPTS}, {}, "leave prompts.categories"),
        ("mopd", {"teachers": {"edits": "x"}}, {}, "no category edits"),
        ("mopd", {"teachers": {"edit": "x"}}, {}, "steps must be at least 200, .* got 6"),
        (
            "mopd",
            {"teachers": {"a": "x"}, "prompts": {"kind": "text", "path": "a"}},
            {},
            "a text file has no categories",
        ),
        (
            "mopd",
            {
                "teachers": {"edit": "x"},
                "guidance_norm": "cfg_zero_star",
                "sampler": {"edit_guidance": 2.0},
            },
            {},
            "cfg_zero_star is not for edits: .* got 2.0",
        ),
        ("trajectory", {"prompts": {"categories": {"beauty": 1.0}}}, {}, "no category beauty"),
        ("trajectory", {"prompts": {"categories": {}}}, {}, "categories name no category"),
        ("dmd2", {"prompts": {"categories": {"caption": 1.0}}}, {}, "no category caption"),
        ("nft", {"prompts": {"sizes": [[64, 64, 1.0], [64, 64, 2.0]]}}, {}, "64x64 more than once"),
        ("nft", {"prompts": {"sizes": [[64, 16, 1.0]]}}, {}, "side 16 is under 32 pixels"),
        ("nft", {"rewards": [{"kind": "ocr", "reader": "a:b"}]}, {}, '"ocr" needs prompts of kind'),
        (
            "nft",
            {"rewards": [{"kind": "scenes", "weights": {"strict": 0.0}}]},
            {},
            "at least one part must have a weight above 0",
        ),
        ("dmd2", {"teacher_checkpoint": "x"}, {"lora": LORA}, "ida averages"),
        ("dmd2", {"teacher": {"steps": 4}}, {}, "teacher.steps and teacher.shift"),
        ("nft", {}, {"freeze": ["gen"]}, "understanding stream must be frozen"),
        ("nft", {}, {"lora": {"rank": 2, "streams": ["und", "gen"]}}, "lora.streams"),
        ("nft", {}, {"lora": {**LORA, "dropout": 0.1}}, "lora.dropout must be 0, got 0.1"),
        ("nft", {"sampler": {"guidance": None}}, {}, "must be 1, got None"),
        ("nft", {}, {"data": [{"kind": "scenes"}]}, "give the stage data = "),
        ("nft", {"prompts": {"kind": "text"}}, {}, "need a path"),
        ("nft", {"rewards": [{"kind": "http"}]}, {}, "needs url"),
        ("nft", {"rewards": [{"kind": "scenes", "url": "http://a"}]}, {}, "has no url"),
        ("nft", {"rewards": []}, {}, "needs at least one reward"),
        ("nft", {"prompts": {**PROMPTS, "width": 1600000}}, {}, "width"),
    ],
)
def test_recipes_that_cannot_work(
    kind: str, method: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        described(kind, method, **stage)


def test_prompts_of_all_stages_are_checked_before_the_first(tmp_path: Path) -> None:
    missing = {"kind": "jsonl", "path": str(tmp_path / "missing.jsonl")}
    first = described("trajectory", steps=1)
    second = described("trajectory", {"prompts": missing})
    stage = replace(second.stages[0], name="second")
    training = trainer(tmp_path, replace(first, stages=(*first.stages, stage)))
    with pytest.raises(DataError, match="missing"):
        training.run()
    assert training.progress.step == 0


def test_programs_of_all_stages_are_imported_before_the_first(tmp_path: Path) -> None:
    first = described("trajectory", steps=1)
    rewards = [{"kind": "program", "name": "support.rewards:missing"}]
    stage = replace(described("nft", {"rewards": rewards}).stages[0], name="second")
    training = trainer(tmp_path, replace(first, stages=(*first.stages, stage)))
    with pytest.raises(ConfigError, match="the module has no 'missing'"):
        training.run()
    assert training.progress.step == 0


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
