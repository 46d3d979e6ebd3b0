"""Diffusion-DPO on pairs of one prompt: the better image against the worse.

Source: Diffusion-DPO (arXiv 2311.12908), with the error of a velocity, ‖x̂ - x‖²/s².
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Literal

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torch.nn.functional import logsigmoid

from neounify.config.ranges import STRICT, Positive
from neounify.flow.path import noisy
from neounify.post_train.base import TwinState
from neounify.post_train.image_groups import ImageGroupMethod, NoisedGroupConfig
from neounify.post_train.iteration import Iteration, Share, Unit
from neounify.post_train.rollout import ImageRollout
from neounify.train.method import StageContext, TrainStep

MIN_REMAINING = 0.05
"""The smallest 1 - t that errors are divided by."""


def prediction_error(
    clean: Float[Tensor, "images ..."],
    image: Float[Tensor, "images ..."],
    t: Float[Tensor, " images"],
) -> Float[Tensor, " images"]:
    """e = mean ‖x̂ - x‖² / max(1 - t, 0.05)²."""
    square = (clean - image).flatten(1).square().mean(1)
    return square / (1 - t).clamp(min=MIN_REMAINING).square()


def dpo_loss(
    errors: Sequence[Float[Tensor, " pairs"]],
    reference_errors: Sequence[Float[Tensor, " pairs"]],
    beta: float,
) -> tuple[Float[Tensor, " pairs"], Tensor]:
    """-log sigmoid(-(β/2)·[(e_θ - e_ref)_w - (e_θ - e_ref)_l]), and whether a pair is in order.

    `errors` and `reference_errors` are those of the better and of the worse images, all at one t
    and ε per pair. A pair is in order when the policy gained more on the better image.
    """
    (win, lose), (win_ref, lose_ref) = errors, reference_errors
    margin = (win - win_ref) - (lose - lose_ref)
    return -logsigmoid(-beta / 2 * margin), (margin < 0).detach()


def best_and_worst(rewards: Float[Tensor, "prompts group"]) -> tuple[Tensor, Tensor]:
    """Indices of the best and worst image of each group, [prompts]; NaN is no reward."""
    return rewards.nan_to_num(nan=-inf).argmax(1), rewards.nan_to_num(nan=inf).argmin(1)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class DpoConfig(NoisedGroupConfig):
    """DPO on the best and worst image of each group, `kind = "dpo"`.

    `beta` is for errors that are means over the values of an image; about 2000.
    """

    kind: Literal["dpo"] = "dpo"
    beta: Positive = 2000.0

    def build(self, context: StageContext) -> Dpo:
        return Dpo(self, context)


class Dpo(ImageGroupMethod):
    """`dpo_loss` of pairs; a share's images are better and worse in turn."""

    config: DpoConfig

    def __init__(self, config: DpoConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.reference = self.keep(TwinState("reference", self.model))

    def units(self, iteration: Iteration[ImageRollout]) -> list[Unit]:
        """The pairs of an iteration: (rollout, (better, worse))."""
        units: list[Unit] = []
        for index, (rollout, rewards, trained) in enumerate(
            zip(iteration.rollouts, iteration.rewards, iteration.trained, strict=True)
        ):
            best, worst = best_and_worst(rewards)
            for prompt in trained.nonzero().flatten().tolist():
                first = prompt * rollout.group
                units.append((index, (first + int(best[prompt]), first + int(worst[prompt]))))
        return units

    def share_loss(self, share: Share[ImageRollout], step: TrainStep) -> Float[Tensor, " images"]:
        """A pair's loss for each of its images, whose mean is that of the pairs."""
        rollout, chosen = share.rollout, share.chosen
        images = self.noisy_images(share)
        image = rollout.final[chosen]
        pairs = len(chosen) // 2
        t = self.config.draw_t(pairs, self.generator).to(image.device).repeat_interleave(2)
        noise = torch.randn((pairs, *image.shape[1:]), generator=self.generator).to(image.device)
        z = noisy(image, noise.repeat_interleave(2, 0), t.view(-1, 1, 1), images.sigma)
        errors = prediction_error(images.clean(self.model, z, t), image, t)
        with torch.no_grad():
            reference = prediction_error(images.clean(self.reference.model, z, t), image, t)
        loss, ordered = dpo_loss(
            (errors[0::2], errors[1::2]), (reference[0::2], reference[1::2]), self.config.beta
        )
        self.metrics.add("ordered", float(ordered.float().mean()), pairs)
        self.metrics.add("loss", float(loss.detach().mean()), pairs)
        return loss.repeat_interleave(2)
