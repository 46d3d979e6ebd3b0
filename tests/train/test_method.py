"""The seam between loop and method: two models with rates and turns of their own, and a state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from neounify.errors import CheckpointError
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.method import Batch, Method, MethodState, StageContext, Step
from neounify.train.optim import OptimizerConfig, OptimizerSet
from neounify.train.recipe import Recipe
from neounify.train.setup import build_setup
from neounify.train.state import check_state, newest_whole_state, saved_states
from train.test_trainer import recipe

TURN = 3
"""The student moves in every third step, the critic in all others."""


class Distillation(Method):
    """A student and a critic, as distribution matching has them: two models, two time scales."""

    def __init__(self, context: StageContext, broken_step: int | None) -> None:
        self.model, self.broken_step = context.setup.model, broken_step
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.critic = nn.Linear(context.setup.model.config.hidden_size, 1)
        self.baseline = torch.zeros(())
        self.steps_taken = 0
        self.seen: list[float] = []

    def optimizers(self) -> list[OptimizerSet]:
        student = dict(self.model.embed_tokens.named_parameters(prefix="embed_tokens"))
        self.student_set = OptimizerSet(
            student,
            OptimizerConfig(learning_rate=2e-3, lr_scale={"shared": 0.5}),
            active=lambda step: step % TURN == TURN - 1,
        )
        self.critic_set = OptimizerSet(
            dict(self.critic.named_parameters()),
            OptimizerConfig(learning_rate=4e-2, betas=(0.0, 0.9)),
            clip=10.0,
            schedule=lambda step: 1 / (1 + step),
            active=lambda step: step % TURN != TURN - 1,
            prefix="critic.",
        )
        return [self.student_set, self.critic_set]

    def batches(self, position: Any) -> Iterator[Batch]:
        number = 0 if position is None else position["next"]
        while True:
            ids = torch.randint(256, (8,), generator=torch.Generator().manual_seed(number))
            number += 1
            yield Batch(
                content=ids, position={"next": number}, samples=[f"prompt-{number}"], tokens=8
            )

    def loss(self, batch: Batch, step: Step) -> Tensor:
        noise = torch.randn((), generator=torch.Generator().manual_seed(step.batch_seed()))
        hidden = self.model.embed_tokens(batch.content).float().mean(0) + 0.1 * noise
        if step.stage_step % TURN == TURN - 1:
            loss = self.critic(hidden).square().sum()
        else:
            loss = (self.critic(hidden.detach()) - 1 - self.baseline).square().sum()
        if step.number == self.broken_step:
            loss = loss * float("nan")
        self.seen.append(loss.item())
        return loss / len(step.batches)

    def end_step(self, step: Step, taken: bool) -> None:
        if taken:
            self.baseline = 0.9 * self.baseline + 0.1 * self.critic.weight.detach().mean()
            self.steps_taken += 1

    def report(self) -> dict[str, float]:
        seen, self.seen = self.seen, []
        return {"distillation/loss": sum(seen) / len(seen)}

    def state(self) -> MethodState:
        tensors = {"baseline": self.baseline, **self.critic.state_dict(prefix="critic.")}
        return MethodState(tensors=tensors, facts={"steps_taken": self.steps_taken})

    def load(self, state: MethodState) -> None:
        self.baseline = state.tensors["baseline"]
        self.critic.load_state_dict(
            {name: state.tensors[f"critic.{name}"] for name in ("weight", "bias")}
        )
        self.steps_taken = state.facts["steps_taken"]


@dataclass
class DistillationConfig:
    """Settings of the method, given to the trainer from outside; keeps the last method built."""

    kind: str = "distillation"
    broken_step: int | None = None
    built: Distillation | None = None
    checked: int = 0

    def check_data(self, context: StageContext) -> None:
        self.checked += 1

    def build(self, context: StageContext) -> Distillation:
        self.built = Distillation(context, self.broken_step)
        return self.built


def one_stage(**stage: Any) -> Recipe:
    return recipe(stages=[{"name": "distil", "steps": 8, "packs_per_step": 2, **stage}])


def trainer(folder: Path, config: DistillationConfig | None, **stage: Any) -> Trainer:
    described = one_stage(**stage)
    setup = build_setup(described, torch.device("cpu"), folder)
    log = Log(folder, Console(quiet=True), tensorboard=False)
    return Trainer(described, setup, folder, log, method=config)


def run(folder: Path, config: DistillationConfig, stop_after: int | None = None) -> Trainer:
    training = trainer(folder, config)
    training.run(stop_after=stop_after)
    return training


def results(training: Trainer, config: DistillationConfig) -> dict[str, Tensor]:
    assert config.built is not None
    weights = {f"model.{n}": p.detach() for n, p in training.model.named_parameters()}
    critic = {f"critic.{n}": p.detach() for n, p in config.built.critic.named_parameters()}
    return {**weights, **critic, "baseline": config.built.baseline}


def reports(folder: Path) -> Sequence[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(x["step"], x["distillation/loss"], x["gradient_norm"]) for x in lines]


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_method_of_two_models_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    whole, cut, resumed = DistillationConfig(), DistillationConfig(), DistillationConfig()
    expected = results(run(tmp_path / "whole", whole), whole)
    run(tmp_path / "cut", cut, stop_after=stop)
    again = trainer(tmp_path / "cut", resumed)
    again.resume(saved_states(again.states)[-1])
    again.run()
    actual = results(again, resumed)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert reports(tmp_path / "cut") == reports(tmp_path / "whole")
    assert resumed.built is not None
    assert resumed.built.steps_taken == 8
    assert resumed.checked == 1


def test_optimizers_move_in_their_turns_at_their_own_rates(tmp_path: Path) -> None:
    config = DistillationConfig()
    training = run(tmp_path, config)
    assert config.built is not None
    student, critic = config.built.student_set, config.built.critic_set
    assert {int(state["step"]) for state in student.members[0].state.values()} == {2}
    assert {int(state["step"]) for state in critic.members[0].state.values()} == {6}
    assert student.members[0].param_groups[0]["lr"] == pytest.approx(2e-3 * 0.5)
    assert critic.members[0].param_groups[0]["lr"] == pytest.approx(4e-2 / 8)
    facts = json.loads((saved_states(training.states)[-1] / "state.json").read_text())
    assert facts["ema_updates"] == 2  # the EMA follows the student alone
    names = [name for member in facts["optimizer_parameters"] for name in member]
    assert names == ["embed_tokens.weight", "critic.weight", "critic.bias"]
    assert facts["position"] == {"next": 16}
    progress = training.progress
    assert (progress.tokens, progress.samples, progress.step) == (8 * 16, 16, 8)


def test_a_step_that_is_not_finite_changes_neither_model(tmp_path: Path) -> None:
    plain, broken = DistillationConfig(), DistillationConfig(broken_step=4)
    before = results(run(tmp_path / "plain", plain, stop_after=4), plain)
    training = run(tmp_path / "broken", broken, stop_after=5)
    after = results(training, broken)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert training.progress.nonfinite == 1
    listed = json.loads((tmp_path / "broken" / "nonfinite.jsonl").read_text())
    assert listed["samples"] == ["prompt-9", "prompt-10"]


def test_a_state_of_another_method_is_refused(tmp_path: Path) -> None:
    run(tmp_path, DistillationConfig(), stop_after=2)
    again = trainer(tmp_path, None)
    again.resume(saved_states(again.states)[-1])
    with pytest.raises(CheckpointError, match=r"'distillation', the stage has 'supervised'"):
        again.run()


def test_damage_to_a_methods_tensors_is_found(tmp_path: Path) -> None:
    training = run(tmp_path, DistillationConfig(), stop_after=6)
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
