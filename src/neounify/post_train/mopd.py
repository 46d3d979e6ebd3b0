"""Merging of experts by on-policy distillation (MOPD, as U1.5 has it, arXiv 2609.11929).

The student paints without gradient and stops at a state z; the velocity there of the expert in the
prompt's capability is the target. An epoch has prompts of one capability, and epochs take the
capabilities in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from neounify.config import ModelConfig
from neounify.config.ranges import STRICT, Count
from neounify.flow.guidance import Norm
from neounify.flow.sampling import ResolvedSampling
from neounify.model.neo import NeoUnify
from neounify.post_train.base import SamplerConfig
from neounify.post_train.distill import (
    SHEET_PROMPTS,
    DistillConfig,
    Painter,
    StateMatching,
    States,
    clean_loss,
)
from neounify.post_train.policy import load_teacher
from neounify.post_train.prompts import PromptCase, PromptConfig, PromptSource, build_prompts
from neounify.train.method import StageContext

if TYPE_CHECKING:
    from neounify.train.recipe import StageRecipe

TIMES = 1
"""Purpose of the random numbers that stopping times are drawn with."""


def velocity_loss(
    clean: Float[Tensor, "images ..."],
    target: Float[Tensor, "images ..."],
    t: Float[Tensor, " images"],
) -> Float[Tensor, " images"]:
    """mean ‖v_θ - v_m‖² of two predictions of the clean image at one z: ‖x̂ - x̂_m‖²/(1 - t)²."""
    return clean_loss(clean, target) / (1 - t).square()


def stopping_time_parameters(progress: float) -> tuple[float, float]:
    """(α, β) of the Beta distribution that t_e is drawn from, at `progress` p = i/I of the epochs.

    Beta(2 + 3p, 5 - 3p): from the noisy half of the path to its clean half.
    """
    return 2 + 3 * progress, 5 - 3 * progress


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class MopdConfig(DistillConfig):
    """Merging of experts by on-policy distillation, `kind = "mopd"`.

    `teachers` are folders of checkpoints by capability, a category of the prompts. Each epoch of
    `epoch_steps` steps has prompts of one capability, in the order of `teachers`, over and over.
    Student and teachers are guided alike by `sampler`, rescaled by `guidance_norm`. Expert
    checkpoints and student must have started from one model.
    """

    kind: Literal["mopd"] = "mopd"
    teachers: Mapping[str, Path] = field(default_factory=dict)
    epoch_steps: Count = 200
    sampler: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(steps=30, guidance=4.0, edit_guidance=1.0)
    )
    guidance_norm: Norm = "global"

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ValueError('teachers: name a checkpoint for each capability: { edit = "folder" }')
        if self.prompts.categories is not None:
            raise ValueError(
                "prompts.categories: an epoch has one capability of teachers, whose names are the "
                "categories; leave prompts.categories out"
            )
        if self.prompts.kind == "text":
            raise ValueError(
                "prompts: a text file has no categories, which name the capabilities of teachers; "
                'give prompts of kind "scenes" or "jsonl"'
            )
        if self.guidance_norm == "cfg_zero_star" and self.sampler.edit_guidance != 1:
            raise ValueError(
                "guidance_norm cfg_zero_star is not for edits: sampler.edit_guidance must be 1, "
                f"got {self.sampler.edit_guidance}"
            )

    @property
    def drawn(self) -> PromptConfig:
        return replace(self.prompts, categories=dict.fromkeys(self.teachers, 1.0))

    @property
    def teacher_folders(self) -> Collection[Path]:
        return set(self.teachers.values())

    def check_stage(self, stage: StageRecipe) -> None:
        """Raise ValueError where a capability would have no epoch."""
        super().check_stage(stage)
        needed = len(self.teachers) * self.epoch_steps
        if stage.steps < needed:
            raise ValueError(
                f"steps must be at least {needed}, an epoch of {self.epoch_steps} steps for each "
                f"of {len(self.teachers)} capabilities, got {stage.steps}; lower epoch_steps or "
                "raise steps"
            )

    def build_prompts(self, model: ModelConfig) -> CapabilityTurns:
        size, token = model.sampling.image_size, model.token_size
        sources = {
            name: build_prompts(replace(self.prompts, categories={name: 1.0}), size, token)
            for name in self.teachers
        }
        return CapabilityTurns(sources, self.epoch_steps * self.prompts_per_step)

    def build(self, context: StageContext) -> Mopd:
        return Mopd(self, context)


class CapabilityTurns:
    """Prompts of one source per epoch: `sources` by capability, `epoch` prompts of each in turn."""

    def __init__(self, sources: Mapping[str, PromptSource], epoch: int) -> None:
        self.sources, self.epoch = sources, epoch

    def case(self, number: int) -> PromptCase:
        epoch, place = divmod(number, self.epoch)
        turn, capability = divmod(epoch, len(self.sources))
        return list(self.sources.values())[capability].case(turn * self.epoch + place)


class Mopd(StateMatching):
    """One state of each rollout, at a time drawn from Beta; an expert gives its velocity there."""

    config: MopdConfig
    prompts: CapabilityTurns

    def __init__(self, config: MopdConfig, context: StageContext) -> None:
        super().__init__(config, context)
        models = {path: load_teacher(path, self.model) for path in config.teacher_folders}
        self.teachers = {name: models[path] for name, path in config.teachers.items()}

    def sampling(self, cases: Sequence[PromptCase]) -> ResolvedSampling:
        """Sampling of student and experts."""
        resolved = self.resolve(self.config.sampler, cases)
        if len(resolved.guidance.branches()) == 1:
            return resolved
        guidance = replace(resolved.guidance, norm=self.config.guidance_norm)
        return replace(resolved, guidance=guidance)

    def states(
        self, cases: Sequence[PromptCase], step: int, place: int, mine: Sequence[int]
    ) -> States:
        sampling = self.sampling(cases)
        grid, prefixes = self.prefixes(cases, sampling)
        times = sampling.times()
        ends = self._ends(times, step, place, len(cases))[list(mine)]
        z = self.noise(step, place, len(cases), grid)[list(mine)]
        images = self.guided(grid, [prefixes[i] for i in mine], sampling.guidance)
        reached = z.clone()
        for k, (t, t_next) in enumerate(pairwise(times)):
            reached[ends == k] = z[ends == k]
            if k == int(ends.max()):
                break
            z = z + (t_next - t) * images.velocity(self.model, z, t)
        stopped = torch.tensor(times, device=z.device)[ends]
        return States(
            grid=grid,
            guidance=sampling.guidance,
            prefixes=prefixes,
            z=reached,
            t=stopped,
            target=images.clean(self.teacher_of(cases), reached, stopped),
            step=ends.tolist(),
        )

    def teacher_of(self, cases: Sequence[PromptCase]) -> NeoUnify:
        """The expert in the capability of some cases, which is one."""
        return self.teachers[cases[0].category]

    def _ends(self, times: Sequence[float], step: int, place: int, count: int) -> Tensor:
        """The step of the sampler that each rollout stops at."""
        every = self.config.epoch_steps
        epochs = -(-self.context.stage.steps // every)
        rng = np.random.default_rng((self.config.seed, step, place, TIMES))
        drawn = rng.beta(*stopping_time_parameters(step // every / epochs), size=count)
        places = np.searchsorted(np.asarray(times[:-1]), drawn, side="right") - 1
        return torch.from_numpy(places.clip(0)).to(self.model.device)

    def state_loss(
        self,
        clean: Float[Tensor, "states n ccc"],
        target: Float[Tensor, "states n ccc"],
        t: Float[Tensor, " states"],
    ) -> Float[Tensor, " states"]:
        return velocity_loss(clean, target, t)

    def sheet_cases(self) -> list[list[PromptCase]]:
        """Cases of every capability, each with its own expert."""
        each = max(1, SHEET_PROMPTS // len(self.prompts.sources))
        return [
            group
            for source in self.prompts.sources.values()
            for group in self.alike(source.case(number) for number in range(each))
        ]

    def painters(self, cases: Sequence[PromptCase]) -> tuple[Painter, Painter]:
        sampling = self.sampling(cases)
        student, teacher = self.model, self.teacher_of(cases)
        times = sampling.times()
        return Painter(student, sampling, times), Painter(teacher, sampling, times)
