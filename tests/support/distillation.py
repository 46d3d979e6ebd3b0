"""A training method for tests: all that a method may be, in small.

A student (the trained model), its teacher (a copy of it at the start) and a critic with a rate,
clipping and turns of its own, as distribution matching has them; prompts of its own, not from
data; a state; metrics, warnings and a file in the run's folder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from neounify.config import ModelConfig
from neounify.config.ranges import STRICT, Count
from neounify.data.sample import DataError
from neounify.errors import CheckpointError
from neounify.files import write_bytes
from neounify.train.method import (
    Finding,
    Method,
    MethodConfig,
    MethodState,
    MicroBatch,
    StageContext,
    TrainingStopped,
    TrainStep,
)
from neounify.train.optim import OptimizerConfig, OptimizerSet
from neounify.train.recipe import StageRecipe

TARGET = "support.distillation:DistillationConfig"
"""What `METHODS` says of it."""
BUILT: list[Distillation] = []
"""Methods that were built in this process, the last one at the end."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillationConfig(MethodConfig):
    """`turn`: the student moves in every `turn`-th step, the critic in the others but for the
    first of each turn, in which nothing moves. `prompts`: micro-batches there are in all."""

    kind: Literal["distillation"] = "distillation"
    needs_data: ClassVar[bool] = False
    turn: Count = 3
    prompts: Count | None = None
    broken_step: int | None = None
    collapse_step: int | None = None
    betas: tuple[float, float] = (0.0, 0.9)

    def check_stage(self, stage: StageRecipe) -> None:
        if self.turn > stage.steps:
            raise ValueError(f"method.turn: {self.turn} steps are more than the stage's")

    def check_data(self, context: StageContext) -> None:
        if context.stage.data and context.mixture.sources[0].size == 1:
            raise DataError("one prompt is too few")

    def checkpoint_config(self, config: ModelConfig) -> ModelConfig:
        return config.replace(sampling=replace(config.sampling, steps=self.turn))

    def examine(self, context: StageContext, seconds: float) -> Iterator[Finding]:
        yield Finding("student", True, f"distils {context.stage.name} in {seconds:g} s")

    def build(self, context: StageContext) -> Distillation:
        BUILT.append(Distillation(self, context))
        return BUILT[-1]


class Distillation(Method):
    """The student's embedding is drawn towards what the critic makes of the teacher's."""

    headline: ClassVar = {"loss": "distillation/loss"}

    def __init__(self, config: DistillationConfig, context: StageContext) -> None:
        self.config, self.context = config, context
        self.model = context.setup.model
        # Of the model at the start of the stage; on a resume, `load` replaces it.
        self.teacher = copy.deepcopy(self.model.embed_tokens).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.critic = nn.Linear(context.setup.model.config.hidden_size, 1)
        self.baseline = torch.zeros(())
        self.steps_taken = 0
        self.seen: list[float] = []
        self.ended: list[bool] = []
        self.closed = False

    def _moves(self, step: int) -> str:
        place = step % self.config.turn
        return "" if place == 0 else "student" if place == self.config.turn - 1 else "critic"

    def optimizers(self) -> list[OptimizerSet]:
        student = dict(self.model.embed_tokens.named_parameters(prefix="embed_tokens"))
        self.student_set = OptimizerSet(
            student,
            OptimizerConfig(learning_rate=2e-3, lr_scale={"shared": 0.5}),
            active=lambda step: self._moves(step) == "student",
        )
        self.critic_set = OptimizerSet(
            dict(self.critic.named_parameters()),
            OptimizerConfig(learning_rate=4e-2, betas=self.config.betas),
            clip=10.0,
            schedule=lambda step: 1 / (1 + step),
            active=lambda step: self._moves(step) == "critic",
            prefix="critic.",
        )
        return [self.student_set, self.critic_set]

    def batches(self, position: object) -> Iterator[MicroBatch]:
        number = position["next"] if isinstance(position, dict) else 0
        try:
            while self.config.prompts is None or number < self.config.prompts:
                ids = torch.randint(256, (8,), generator=torch.Generator().manual_seed(number))
                with torch.no_grad():  # a rollout of the weights as they are
                    rolled = self.model.embed_tokens(ids).float().mean(0)
                number += 1
                yield MicroBatch(
                    content=(ids, rolled),
                    position={"next": number},
                    samples=[f"prompt-{number}"],
                    tokens=8,
                )
        finally:
            self.closed = True

    def loss(self, batch: MicroBatch, step: TrainStep) -> Tensor:
        ids, rolled = batch.content
        noise = torch.randn((), generator=torch.Generator().manual_seed(step.batch_seed()))
        aim = self.teacher(ids).float().mean(0) + 0.1 * noise
        if self._moves(step.stage_step) == "student":
            hidden = self.model.embed_tokens(ids).float().mean(0)
            loss = self.critic(hidden).square().sum() + (hidden - aim).square().mean()
        else:
            loss = (self.critic(rolled) - self.critic(aim) - self.baseline).square().sum()
        if step.number == self.config.broken_step:
            loss = loss * float("nan")
        self.seen.append(loss.item())
        return loss / len(step.batches)

    def end_step(self, step: TrainStep, taken: bool) -> None:
        self.ended.append(taken)
        if taken:
            self.baseline = 0.9 * self.baseline + 0.1 * self.critic.weight.detach().mean()
            self.steps_taken += 1
        if step.number == self.config.collapse_step:
            raise TrainingStopped("the policy has collapsed; lower the rate")

    def report(self) -> dict[str, float]:
        seen, self.seen = self.seen, []
        folder = self.context.folder / "sheets"
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"taken-{self.steps_taken:04d}.txt", f"{self.baseline}\n".encode())
        return {"distillation/loss": sum(seen) / len(seen)} if seen else {}

    def warnings(self, stage_step: int, report: Mapping[str, float]) -> list[str]:
        if stage_step == 5:
            return [f"loss {report['distillation/loss']:.3g} at step {stage_step}: lower turn"]
        return []

    def state(self) -> MethodState:
        tensors = {
            "baseline": self.baseline,
            **self.critic.state_dict(prefix="critic."),
            **self.teacher.state_dict(prefix="teacher."),
        }
        return MethodState(tensors=tensors, facts={"steps_taken": self.steps_taken})

    def load(self, state: MethodState) -> None:
        try:
            self.baseline = state.tensors["baseline"]
            for name in ("critic", "teacher"):
                prefix = f"{name}."
                of_one = {
                    n.removeprefix(prefix): tensor
                    for n, tensor in state.tensors.items()
                    if n.startswith(prefix)
                }
                getattr(self, name).load_state_dict(of_one)
            self.steps_taken = state.facts["steps_taken"]
        except KeyError as error:
            raise CheckpointError(f"the state lacks {error}") from error
