"""Groups of images: base of the methods that learn from images of each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from neounify.config.ranges import STRICT, AboveZero, Fraction
from neounify.files import atomic_file
from neounify.image.contact_sheet import contact_sheet
from neounify.post_train.answers import rollout_seed
from neounify.post_train.base import SamplerConfig
from neounify.post_train.group_config import GroupConfig
from neounify.post_train.groups import GroupMethod
from neounify.post_train.iteration import Iteration, Share
from neounify.post_train.policy import NoisyImages, Prefixes
from neounify.post_train.prompts import PromptCase
from neounify.post_train.rollout import (
    ImageRollout,
    RandomSteps,
    restored_rollout,
    sample_groups,
)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageGroupConfig(GroupConfig):
    """Groups of images, and how they are sampled."""

    rollout_settings: ClassVar[tuple[str, ...]] = (*GroupConfig.rollout_settings, "sampler")

    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class NoisedGroupConfig(ImageGroupConfig):
    """Groups of images that are sampled without guidance and noised again for the update.

    `min_t` and `max_t` bound the times that they are noised to.
    """

    min_t: Fraction = 0.0
    max_t: AboveZero = 0.98

    def __post_init__(self) -> None:
        self.sampler.check_unguided("sampler")
        if not self.min_t < self.max_t < 1:
            raise ValueError(f"min_t and max_t must be 0 <= {self.min_t} < {self.max_t} < 1")

    def draw_t(self, count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
        """Uniform times, on the CPU."""
        return self.min_t + (self.max_t - self.min_t) * torch.rand(count, generator=generator)


class ImageGroupMethod(GroupMethod[ImageRollout]):
    """Images by the engine's denoiser; a subclass gives `random_steps` and `share_loss`."""

    config: ImageGroupConfig

    def random_steps(self, iteration: int) -> RandomSteps:
        """Random steps of an iteration's rollouts."""
        return RandomSteps()

    def noisy_images(self, share: Share[ImageRollout]) -> NoisyImages:
        """The images of a share behind their prompts, without guidance."""
        rollout = share.rollout
        prefixes = [rollout.prefixes[i]["cond"] for i in share.chosen.tolist()]
        return NoisyImages(self.model, rollout.grid, prefixes, self.attention)

    def rollout(
        self,
        cases: Sequence[PromptCase],
        number: int,
        index: int,
        prefixes: Sequence[Prefixes] | None = None,
    ) -> ImageRollout:
        """Images behind `prefixes`, one per image, or behind the prompts of the cases."""
        return sample_groups(
            self.sampler,
            self.processor,
            cases,
            self.config.group,
            self.resolve(self.config.sampler, cases),
            self.random_steps(number),
            seed=rollout_seed(self.config.seed, index),
            iteration=number,
            prefixes=prefixes,
            attention=self.attention,
        )

    def restored(
        self,
        cases: Sequence[PromptCase],
        number: int,
        tensors: Mapping[str, Tensor],
        prefixes: Sequence[Prefixes] | None = None,
    ) -> ImageRollout:
        return restored_rollout(
            self.sampler,
            self.processor,
            cases,
            self.config.group,
            self.resolve(self.config.sampler, cases),
            self.random_steps(number),
            tensors,
            prefixes=prefixes,
        )

    def save_sheet(self, iteration: Iteration[ImageRollout], index: int) -> None:
        """Save groups as rows, each image over its reward, advantage and prompt."""
        rollout = iteration.rollouts[index]
        rewards = iteration.rewards[index].flatten().tolist()
        advantages = iteration.advantages[index].flatten().tolist()
        prompts = [case.prompt for case in rollout.cases for _ in range(rollout.group)]
        captions = [
            f"{reward:.2f} A {advantage:+.1f} {prompt}"
            for reward, advantage, prompt in zip(rewards, advantages, prompts, strict=True)
        ]
        sheet = contact_sheet(
            rollout.outputs(),
            captions,
            [a >= 0 for a in advantages],
            columns=rollout.group,
            side=96,
        )
        with atomic_file(self.sheet_of(iteration, index, ".png")) as aside:
            sheet.save(aside, "PNG")
