"""Distillation on the student's own trajectory: the base of its methods, and fewer steps.

A student paints without gradient and stops at a state z; a frozen teacher says where the prediction
there should point. In trajectory distillation the teacher takes several guided steps to the
student's next time, and the student's one step must land there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from neounify.cache import SequenceCache
from neounify.config import ModelConfig
from neounify.config.ranges import STRICT, Count, NonNegativeInt
from neounify.errors import CheckpointError
from neounify.files import atomic_file
from neounify.flow.guidance import Branch, Guidance
from neounify.flow.sampling import ResolvedSampling
from neounify.image.contact_sheet import contact_sheet
from neounify.model.layout import Grid
from neounify.model.neo import NeoUnify
from neounify.post_train.answers import rollout_seed
from neounify.post_train.base import PromptMethod, PromptMethodConfig, SamplerConfig, TwinState
from neounify.post_train.policy import GuidedImages, Prefixes, check_teacher, load_teacher, prefill
from neounify.post_train.prompts import PromptCase
from neounify.post_train.report import update_report
from neounify.post_train.reward_kinds import Pixels
from neounify.post_train.rollout import image_request, initial_noise, pixels_of
from neounify.train.method import (
    Finding,
    MicroBatch,
    StageContext,
    TrainStep,
    evaluation_mode,
)

SHEET_PROMPTS = 8
"""Prompts of a sheet."""
Velocity = Callable[[Tensor, float], Tensor]
"""The (guided) velocity of a model: (z, t) → v of z's shape."""


def euler_path(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """The state at the last of `times`, by Euler's steps from z at the first."""
    for t, t_next in pairwise(times):
        z = z + (t_next - t) * velocity(z, t)
    return z


def between(t: float, t_next: float, steps: int) -> list[float]:
    """`steps` + 1 evenly spaced times from t to t_next."""
    return [t + (t_next - t) * index / steps for index in range(steps)] + [t_next]


def trajectory_target(z: Tensor, reached: Tensor, t: float, t_next: float) -> Tensor:
    """x̂* = z + (1 - t)·(z* - z)/(t' - t): the prediction whose Euler step from z lands on z*."""
    return z + (1 - t) / (t_next - t) * (reached - z)


def clean_loss(
    clean: Float[Tensor, "images ..."], target: Float[Tensor, "images ..."]
) -> Float[Tensor, " images"]:
    """mean ‖x̂ - x̂*‖²."""
    return (clean - target).flatten(1).square().mean(1)


# --- methods ---


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig(PromptMethodConfig):
    """Settings of every distillation: `prompts_per_step` images in a step of the optimizer.

    Every `sheet_every` steps a sheet shows images of student and teacher from the same noise, and
    the report page is written; 0 writes the page at the end alone.
    """

    prompts_per_step: Count = 8
    sheet_every: NonNegativeInt = 20

    @property
    def teacher_folders(self) -> Collection[Path]:
        """Checkpoints of teachers."""
        return ()

    @abstractmethod
    def build(self, context: StageContext) -> Distill: ...

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError for fewer images in a step than ranks."""
        if self.prompts_per_step < ranks:
            raise ValueError(
                f"{ranks} ranks share the images of a step, which are {self.prompts_per_step}: "
                f"method.prompts_per_step must be {ranks} at least"
            )

    def check_data(self, context: StageContext) -> None:
        """Raise an error for prompts or teachers that cannot be used."""
        super().check_data(context)
        for folder in self.teacher_folders:
            check_teacher(folder, context.setup.model)

    def examine(self, context: StageContext, seconds: float) -> Iterator[Finding]:
        from neounify.post_train.doctor import examine_distillation

        return examine_distillation(context, self, seconds)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentConfig(DistillConfig):
    """A student of few steps without guidance, and its guided teacher.

    `student` is how the student will be sampled; its steps, guidance and shift are stored in the
    checkpoint at the end. `teacher` is the teacher's guidance, by default that of its checkpoint.
    The teacher has the weights at the start of the stage, or those of `teacher_checkpoint`, a
    folder of a model of the same shape.
    """

    student: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=8))
    teacher: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(guidance=None, edit_guidance=None)
    )
    teacher_checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.student.steps is None:
            raise ValueError("student.steps: give the number of steps the student shall need")
        self.student.check_unguided("student")
        if self.teacher.steps is not None or self.teacher.shift is not None:
            raise ValueError(
                "teacher.steps and teacher.shift must be left out: the teacher's times follow from "
                "the student's"
            )

    @property
    def teacher_folders(self) -> Collection[Path]:
        return () if self.teacher_checkpoint is None else (self.teacher_checkpoint,)

    def checkpoint_config(self, config: ModelConfig) -> ModelConfig:
        return with_sampling(config, self.student)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class TrajectoryConfig(StudentConfig):
    """Trajectory distillation, `kind = "trajectory"`: K steps of a student for K·m of its teacher.

    The teacher takes `teacher_steps` m for each step of the student.
    """

    kind: Literal["trajectory"] = "trajectory"
    teacher_steps: Count = 2

    def build(self, context: StageContext) -> Trajectory:
        return Trajectory(self, context)


@dataclass(frozen=True, eq=False)
class Painter:
    """A model as it samples whole images: its sampling, and times from 0 to 1 to take."""

    model: NeoUnify
    sampling: ResolvedSampling
    times: Sequence[float]


@dataclass(frozen=True, eq=False)
class States:
    """States of the student and their targets, images of one size.

    `z` and `target` (x̂*) [states, n, token_width], `t` [states]; `prefixes` and `step` (k) of
    each.
    """

    grid: Grid
    guidance: Guidance
    prefixes: Sequence[Prefixes]
    z: Float[Tensor, "states n ccc"]
    t: Float[Tensor, " states"]
    target: Float[Tensor, "states n ccc"]
    step: Sequence[int]

    def chosen(self, indices: Sequence[int]) -> States:
        """Some of the states."""
        rows = torch.tensor(indices, device=self.z.device)
        return replace(
            self,
            prefixes=[self.prefixes[i] for i in indices],
            z=self.z[rows],
            t=self.t[rows],
            target=self.target[rows],
            step=[self.step[i] for i in indices],
        )


@dataclass(frozen=True, eq=False)
class StatesOfStep:
    """A micro-batch: states by image size, and how many the whole step has."""

    parts: Sequence[States]
    total: int


class Distill(PromptMethod):
    """Rollouts of a student, and sheets of it and its teacher."""

    config: DistillConfig
    headline: ClassVar[Mapping[str, str]] = {"loss": "loss"}

    def guided(self, grid: Grid, prefixes: Sequence[Prefixes], guidance: Guidance) -> GuidedImages:
        """Images of one size behind these prompts."""
        return GuidedImages(self.model, grid, prefixes, guidance, self.attention)

    def end_step(self, step: TrainStep, taken: bool) -> None:
        every, done = self.config.sheet_every, step.stage_step + 1
        first = self.context.ranks.first
        if first and every and done % every == 0 and done < self.context.stage.steps:
            self.save_sheet(done)
            update_report(self.context)

    def end_stage(self) -> None:
        """The last sheet is of the exported weights."""
        if self.config.sheet_every and self.context.ranks.first:
            self.save_sheet(self.context.stage.steps)
        super().end_stage()

    # --- sheets ---

    @abstractmethod
    def painters(self, cases: Sequence[PromptCase]) -> tuple[Painter, Painter]:
        """Student and teacher of cases that are sampled in one batch."""

    def sheet_cases(self) -> list[list[PromptCase]]:
        """Cases of a sheet, those that are sampled in one batch together."""
        return self.cases(0, SHEET_PROMPTS)

    def save_sheet(self, step: int) -> None:
        """Save what teacher and student paint from the same noise, in pairs."""
        images: list[Pixels] = []
        captions: list[str] = []
        with evaluation_mode(self.model), torch.no_grad():
            for place, cases in enumerate(self.sheet_cases()):
                student, teacher = (
                    self._painted(one, cases, place) for one in self.painters(cases)
                )
                for case, mine, theirs in zip(cases, student, teacher, strict=True):
                    images += [theirs, mine]
                    apart = float(np.abs(mine.astype(int) - theirs).mean())
                    captions += [f"teacher: {case.prompt}", f"student, {apart:.1f} of 255 apart"]
        sheet = contact_sheet(images, captions, [True] * len(images), columns=4, side=96)
        with atomic_file(self.sheet(f"step-{step:06d}.png")) as aside:
            sheet.save(aside, "PNG")

    def _painted(self, painter: Painter, cases: Sequence[PromptCase], place: int) -> list[Pixels]:
        grid, prefixes = self.prefixes(cases, painter.sampling)
        images = self.guided(grid, prefixes, painter.sampling.guidance)
        z = self.noise(0, place, len(cases), grid)
        end = euler_path(lambda x, t: images.velocity(painter.model, x, t), z, painter.times)
        return pixels_of(end, grid, self.model.config)

    # --- rollouts ---

    def noise(self, step: int, place: int, count: int, grid: Grid, part: int = 0) -> Tensor:
        """Initial scaled noise [count, n, token_width] of rollout `place` of a micro-batch."""
        seed, config = rollout_seed(self.config.seed, part, place), self.model.config
        draws = [initial_noise(seed, step, image, grid, config) for image in range(count)]
        return torch.stack(draws).to(self.model.device)

    def prefixes(
        self, cases: Sequence[PromptCase], sampling: ResolvedSampling
    ) -> tuple[Grid, list[dict[Branch, SequenceCache]]]:
        """Grid and cached prompts of cases of one size."""
        requests = [image_request(case, sampling) for case in cases]
        return requests[0].grid(self.model.config), prefill(
            self.model, self.processor, cases, requests
        )


class StateMatching(Distill):
    """Batches of student states with targets; a subclass gives `states` and `state_loss`."""

    @abstractmethod
    def states(
        self, cases: Sequence[PromptCase], step: int, place: int, mine: Sequence[int]
    ) -> States:
        """The states of a rollout of cases of one size: of some of its images, behind the prompts
        of all; those of each step together."""

    def _shared_states(self, cases: Sequence[PromptCase], step: int, place: int) -> States:
        """The states of a rollout, each rank computing those of some images; collective."""
        ranks = self.context.ranks
        share = ranks.share(len(cases))
        # A rank without a share computes an image as well, since each needs all prompts.
        mine = share or range(1)
        some = self.states(cases, step, place, mine)
        if ranks.size == 1:
            return some
        tensors = (some.z, some.t, some.target, torch.tensor(some.step))
        by_step = [x.cpu().unflatten(0, (-1, len(mine)))[:, : len(share)] for x in tensors]
        parts = zip(*ranks.gather(by_step), strict=True)
        z, t, target, steps = (torch.cat(one, dim=1).flatten(0, 1) for one in parts)
        device = some.z.device
        return replace(
            some,
            z=z.to(device),
            t=t.to(device),
            target=target.to(device),
            step=steps.tolist(),
        )

    def state_loss(
        self,
        clean: Float[Tensor, "states n ccc"],
        target: Float[Tensor, "states n ccc"],
        t: Float[Tensor, " states"],
    ) -> Float[Tensor, " states"]:
        """The loss of each state."""
        return clean_loss(clean, target)

    def batches(self, position: Any) -> Iterator[MicroBatch]:
        step = 0 if position is None else checked_step(position)
        parts = self.context.stage.packs_per_step
        while True:
            with evaluation_mode(self.model), torch.no_grad():
                groups = self.cases(
                    step * self.config.prompts_per_step, self.config.prompts_per_step
                )
                states = [self._shared_states(cases, step, n) for n, cases in enumerate(groups)]
            pairs = [(n, i) for n, one in enumerate(states) for i in range(len(one.step))]
            order = np.random.default_rng((self.config.seed, step)).permutation(len(pairs))
            ranks = self.context.ranks
            for part, dealt in enumerate(np.array_split(order, parts)):
                if part % ranks.size != ranks.rank:
                    continue
                mine = sorted(pairs[index] for index in dealt)
                chosen = [
                    one.chosen([i for other, i in mine if other == n])
                    for n, one in enumerate(states)
                    if any(other == n for other, _ in mine)
                ]
                tokens = sum(one.grid.length * len(one.step) for one in chosen)
                yield MicroBatch(
                    content=StatesOfStep(chosen, len(pairs)),
                    position=step + (part + 1 == parts),
                    samples=[f"step {step} state {i}" for _, i in mine],
                    images=len(mine),
                    tokens=tokens,
                    cost=tokens,
                )
            step += 1

    def loss(self, batch: MicroBatch, step: TrainStep) -> Tensor:
        content: StatesOfStep = batch.content
        total = torch.zeros((), device=self.model.device)
        for part in content.parts:
            images = self.guided(part.grid, part.prefixes, part.guidance)
            losses = self.state_loss(images.clean(self.model, part.z, part.t), part.target, part.t)
            for k, value in zip(part.step, losses.tolist(), strict=True):
                self.metrics.add("loss", value)
                self.metrics.add(f"loss/step{k}", value)
            total = total + losses.sum()
        return total / content.total


class Teacher:
    """A frozen model: the weights at the start of a stage, which are saved, or a checkpoint."""

    def __init__(self, folder: Path | None, model: NeoUnify) -> None:
        self._twin: TwinState | None = None
        if folder is None:
            self._twin = TwinState("teacher", model)
            self.model = self._twin.model
        else:
            self.model = load_teacher(folder, model)

    def tensors(self) -> dict[str, Tensor]:
        """What a saved state needs of it."""
        return {} if self._twin is None else self._twin.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore it. Raises CheckpointError."""
        if self._twin is not None:
            self._twin.load(tensors)


class Student(Distill):
    """A student of fewer steps, and its teacher."""

    config: StudentConfig
    sheet_steps = 4
    """Steps of the teacher on a sheet for each of the student's."""

    def __init__(self, config: StudentConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.teacher = self.keep(Teacher(config.teacher_checkpoint, self.model))

    def sampling(self, cases: Sequence[PromptCase]) -> tuple[ResolvedSampling, ResolvedSampling]:
        """Sampling of student and teacher."""
        student = self.resolve(self.config.student, cases)
        return student, self.resolve(self.config.teacher, cases, self.teacher.model)

    def painters(self, cases: Sequence[PromptCase]) -> tuple[Painter, Painter]:
        student, guided = self.sampling(cases)
        times = student.times()
        finer = [t for pair in pairwise(times) for t in between(*pair, self.sheet_steps)[:-1]]
        return (
            Painter(self.model, student, times),
            Painter(self.teacher.model, guided, [*finer, times[-1]]),
        )


class Trajectory(StateMatching, Student):
    """All K states of each rollout; the teacher goes m guided steps from each."""

    config: TrajectoryConfig

    def __init__(self, config: TrajectoryConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.sheet_steps = config.teacher_steps

    def states(
        self, cases: Sequence[PromptCase], step: int, place: int, mine: Sequence[int]
    ) -> States:
        student, guided = self.sampling(cases)
        grid, prefixes = self.prefixes(cases, guided)
        z = self.noise(step, place, len(cases), grid)[list(mine)]
        some = [prefixes[i] for i in mine]
        one = self.guided(grid, some, student.guidance)
        many = self.guided(grid, some, guided.guidance)
        times = student.times()
        states, targets = [], []
        for t, t_next in pairwise(times):
            path = between(t, t_next, self.config.teacher_steps)
            reached = euler_path(lambda x, at: many.velocity(self.teacher.model, x, at), z, path)
            states.append(z)
            targets.append(trajectory_target(z, reached, t, t_next))
            z = z + (t_next - t) * one.velocity(self.model, z, t)
        number = len(mine)
        return States(
            grid=grid,
            guidance=student.guidance,
            prefixes=prefixes * len(states),
            z=torch.cat(states),
            t=torch.tensor(times[:-1], device=z.device).repeat_interleave(number),
            target=torch.cat(targets),
            step=[k for k in range(len(states)) for _ in range(number)],
        )


def with_sampling(config: ModelConfig, student: SamplerConfig) -> ModelConfig:
    """A config with a student's steps, guidance and shift as its defaults."""
    defaults = config.sampling
    sampling = replace(
        defaults,
        steps=student.steps or defaults.steps,
        guidance=1.0,
        image_guidance=1.0,
        shift=defaults.shift if student.shift is None else student.shift,
    )
    return config.replace(sampling=sampling)


def checked_step(position: Any) -> int:
    """A position that is a number of steps. Raises CheckpointError."""
    if type(position) is not int or position < 0:
        raise CheckpointError(f"position must be a number of steps, got {position!r}")
    return position
