"""Distillation on the student's own trajectory: fewer steps, no guidance, merged experts.

A student paints without gradient and stops at a state z; a frozen teacher says where the prediction
there should point. In trajectory distillation the teacher takes several guided steps to the
student's next time, and the student's one step must land there; in MOPD (U1.5, arXiv 2609.11929)
the teacher's own velocity at z is the target, and each sample's capability chooses the teacher.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from neounify.errors import CheckpointError, ConfigError
from neounify.flow.guidance import Branch, Guidance, Norm
from neounify.flow.path import noise_scale
from neounify.flow.sampling import ResolvedSampling
from neounify.model.layout import Grid
from neounify.model.neo import NeoUnify
from neounify.post_train.base import PromptMethod, PromptMethodConfig, SamplerConfig, TwinState
from neounify.post_train.policy import GuidedImages, Prefixes, load_teacher, prefill
from neounify.post_train.prompts import PromptCase, PromptConfig
from neounify.post_train.report import update_report
from neounify.post_train.rollout import START, image_request, noise_generator
from neounify.train.method import (
    Finding,
    MicroBatch,
    StageContext,
    TrainStep,
    evaluation_mode,
)

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


def velocity_loss(
    clean: Float[Tensor, "images ..."],
    target: Float[Tensor, "images ..."],
    t: Float[Tensor, " images"],
) -> Float[Tensor, " images"]:
    """mean ‖v_θ - v_m‖² of two predictions of the clean image at one z: ‖x̂ - x̂_m‖²/(1 - t)²."""
    return clean_loss(clean, target) / (1 - t).square()


def stopping_time_parameters(progress: float) -> tuple[float, float]:
    """(α, β) of the Beta distribution that t_e is drawn from, at `progress` 0 to 1 of a run.

    Beta(2 + 3p, 5 - 3p): from the noisy half of the path to its clean half.
    """
    return 2 + 3 * progress, 5 - 3 * progress


# --- methods ---


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig(PromptMethodConfig):
    """Settings of every distillation: `prompts_per_step` images, samplers of both models.

    The report page is written every `report_every` steps; 0 writes it at the end alone.
    """

    prompts: PromptConfig = field(default_factory=PromptConfig)
    prompts_per_step: Count = 8
    report_every: NonNegativeInt = 20
    seed: NonNegativeInt = 0

    @abstractmethod
    def build(self, context: StageContext) -> Distill: ...

    def examine(self, context: StageContext, seconds: float) -> Iterator[Finding]:
        from neounify.post_train.doctor import examine_distillation

        return examine_distillation(context, self, seconds)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class TrajectoryConfig(DistillConfig):
    """Trajectory distillation, `kind = "trajectory"`: K steps of a student for K·m of its teacher.

    `student` is how the student will be sampled; its steps, guidance and shift are stored in the
    checkpoint at the end. `teacher` is its guidance, by default the checkpoint's, and takes
    `teacher_steps` m for each step of the student. The teacher has the weights at the start of the
    stage, or those of `teacher_checkpoint`, a folder of a model of the same shape.
    """

    kind: Literal["trajectory"] = "trajectory"
    student: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=8))
    teacher: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(guidance=None, edit_guidance=None)
    )
    teacher_steps: Count = 2
    teacher_checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.student.steps is None:
            raise ValueError("student.steps: give the number of steps the student shall need")
        self.student.check_unguided("student")
        if self.teacher.steps is not None or self.teacher.shift is not None:
            raise ValueError(
                "teacher.steps and teacher.shift follow from the student's times and teacher_steps"
            )

    def checkpoint_config(self, config: ModelConfig) -> ModelConfig:
        return with_sampling(config, self.student)

    def build(self, context: StageContext) -> Trajectory:
        return Trajectory(self, context)


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
    """Batches of student states with targets; a subclass gives `states` and `state_loss`."""

    headline: ClassVar[Mapping[str, str]] = {"loss": "loss"}

    def __init__(self, config: DistillConfig, context: StageContext) -> None:
        super().__init__(config.prompts, context)
        self.config = config

    def states(self, cases: Sequence[PromptCase], step: int, place: int) -> States:
        """The states of one rollout of the student, of cases of one size."""
        raise NotImplementedError

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
                states = [self.states(cases, step, n) for n, cases in enumerate(groups)]
            pairs = [(n, i) for n, one in enumerate(states) for i in range(len(one.step))]
            order = np.random.default_rng((self.config.seed, step)).permutation(len(pairs))
            for part, dealt in enumerate(np.array_split(order, parts)):
                mine = sorted(pairs[index] for index in dealt)
                chosen = [
                    one.chosen([i for other, i in mine if other == n])
                    for n, one in enumerate(states)
                    if any(other == n for other, _ in mine)
                ]
                yield MicroBatch(
                    content=StatesOfStep(chosen, len(pairs)),
                    position=step + (part + 1 == parts),
                    samples=[f"step {step} state {i}" for _, i in mine],
                    images=len(mine),
                    tokens=sum(one.grid.length * len(one.step) for one in chosen),
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

    def guided(self, grid: Grid, prefixes: Sequence[Prefixes], guidance: Guidance) -> GuidedImages:
        """Images of one size behind these prompts."""
        return GuidedImages(self.model, grid, prefixes, guidance, self.attention)

    def end_step(self, step: TrainStep, taken: bool) -> None:
        every = self.config.report_every
        if every and (step.stage_step + 1) % every == 0:
            update_report(self.context)

    def noise(self, step: int, place: int, count: int, grid: Grid) -> Tensor:
        """Initial scaled noise [count, n, token_width] of a rollout."""
        config = self.model.config
        shape = (grid.length, config.token_width)
        draws = [
            torch.randn(shape, generator=noise_generator(self.config.seed + place, step, START, i))
            for i in range(count)
        ]
        return torch.stack(draws).to(self.model.device) * noise_scale(grid.length, config.flow)

    def prefixes(
        self, cases: Sequence[PromptCase], sampling: ResolvedSampling
    ) -> tuple[Grid, list[dict[Branch, SequenceCache]]]:
        """Grid and cached prompts of cases of one size."""
        requests = [image_request(case, sampling) for case in cases]
        return requests[0].grid(self.model.config), prefill(
            self.model, self.processor, cases, requests
        )


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


class Trajectory(Distill):
    """All K states of each rollout; the teacher goes m guided steps from each."""

    config: TrajectoryConfig

    def __init__(self, config: TrajectoryConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.teacher = self.keep(Teacher(config.teacher_checkpoint, self.model))

    def states(self, cases: Sequence[PromptCase], step: int, place: int) -> States:
        student = self.resolve(self.config.student, cases)
        guided = self.resolve(self.config.teacher, cases)
        grid, prefixes = self.prefixes(cases, guided)
        z = self.noise(step, place, len(cases), grid)
        one = self.guided(grid, prefixes, student.guidance)
        many = self.guided(grid, prefixes, guided.guidance)
        times = student.times()
        states, targets = [], []
        for t, t_next in pairwise(times):
            path = between(t, t_next, self.config.teacher_steps)
            reached = euler_path(lambda x, at: many.velocity(self.teacher.model, x, at), z, path)
            states.append(z)
            targets.append(trajectory_target(z, reached, t, t_next))
            z = z + (t_next - t) * one.velocity(self.model, z, t)
        number = len(cases)
        return States(
            grid=grid,
            guidance=student.guidance,
            prefixes=prefixes * len(states),
            z=torch.cat(states),
            t=torch.tensor(times[:-1], device=z.device).repeat_interleave(number),
            target=torch.cat(targets),
            step=[k for k in range(len(states)) for _ in range(number)],
        )


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class MopdConfig(DistillConfig):
    """Merging of experts by on-policy distillation, `kind = "mopd"`.

    `teachers` are folders of checkpoints by capability, a category of the prompts; each sample has
    one teacher. Student and teachers are guided alike by `sampler`, rescaled by `guidance_norm`.
    Expert checkpoints and student must have started from one model.
    """

    kind: Literal["mopd"] = "mopd"
    teachers: Mapping[str, Path] = field(default_factory=dict)
    sampler: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(steps=30, guidance=4.0, edit_guidance=1.0)
    )
    guidance_norm: Norm = "global"

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ValueError('teachers: name a checkpoint for each capability: { edit = "folder" }')
        if self.prompts.categories is not None:
            missing = sorted(set(self.prompts.categories) - set(self.teachers))
            if missing:
                raise ValueError(f"teachers: none for prompts of {', '.join(missing)}")

    def build(self, context: StageContext) -> Mopd:
        return Mopd(self, context)


class Mopd(Distill):
    """One state of each rollout, at a time drawn from Beta; an expert gives its velocity there."""

    config: MopdConfig

    def __init__(self, config: MopdConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.teachers = {n: load_teacher(path, self.model) for n, path in config.teachers.items()}

    def states(self, cases: Sequence[PromptCase], step: int, place: int) -> States:
        resolved = self.resolve(self.config.sampler, cases)
        guidance = resolved.guidance
        if len(guidance.branches()) > 1:
            guidance = replace(guidance, norm=self.config.guidance_norm)
        grid, prefixes = self.prefixes(cases, resolved)
        times = resolved.times()
        ends = self._ends(times, step, place, len(cases))
        z = self.noise(step, place, len(cases), grid)
        student = self.guided(grid, prefixes, guidance)
        reached = z.clone()
        for k, (t, t_next) in enumerate(pairwise(times)):
            reached[ends == k] = z[ends == k]
            if k == int(ends.max()):
                break
            z = z + (t_next - t) * student.velocity(self.model, z, t)
        stopped = torch.tensor(times, device=z.device)[ends]
        target = torch.empty_like(reached)
        names = [self._teacher(case) for case in cases]
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            images = self.guided(grid, [prefixes[i] for i in rows], guidance)
            target[rows] = images.clean(self.teachers[name], reached[rows], stopped[rows])
        return States(
            grid=grid,
            guidance=guidance,
            prefixes=prefixes,
            z=reached,
            t=stopped,
            target=target,
            step=ends.tolist(),
        )

    def _ends(self, times: Sequence[float], step: int, place: int, count: int) -> Tensor:
        """The step of the sampler that each rollout stops at."""
        progress = step / max(1, self.context.stage.steps - 1)
        rng = np.random.default_rng((self.config.seed, step, place))
        drawn = rng.beta(*stopping_time_parameters(min(1.0, progress)), size=count)
        places = np.searchsorted(np.asarray(times[:-1]), drawn, side="right") - 1
        return torch.from_numpy(places.clip(0)).to(self.model.device)

    def _teacher(self, case: PromptCase) -> str:
        if case.category not in self.teachers:
            raise ConfigError(
                f"method.teachers: none for category {case.category!r} of the prompt "
                f"{case.prompt[:80]!r}; there are {', '.join(self.teachers)}"
            )
        return case.category

    def state_loss(
        self,
        clean: Float[Tensor, "states n ccc"],
        target: Float[Tensor, "states n ccc"],
        t: Float[Tensor, " states"],
    ) -> Float[Tensor, " states"]:
        return velocity_loss(clean, target, t)


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
