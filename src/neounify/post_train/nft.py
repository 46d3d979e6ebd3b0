"""DiffusionNFT: reinforcement learning on the forward process, without log-probabilities.

Source: DiffusionNFT (arXiv 2509.16117), for a network that predicts the clean image.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from neounify.config.ranges import STRICT, Fraction, NonNegative, Positive
from neounify.flow.path import noisy as noised
from neounify.model.neo import NeoUnify
from neounify.post_train.base import TwinState
from neounify.post_train.image_groups import ImageGroupMethod, NoisedGroupConfig
from neounify.post_train.iteration import Share
from neounify.post_train.policy import move_towards
from neounify.post_train.rollout import ImageRollout
from neounify.train.method import StageContext, TrainStep


def positive_share(
    advantage: Float[Tensor, " images"], max_advantage: float
) -> Float[Tensor, " images"]:
    """a = ½ + ½·clip(A / A_max, ±1): 1 for the best images, 0 for the worst."""
    return 0.5 + 0.5 * (advantage / max_advantage).clamp(-1, 1)


def nft_loss(
    clean: Float[Tensor, "images ..."],
    old: Float[Tensor, "images ..."],
    image: Float[Tensor, "images ..."],
    positive: Float[Tensor, " images"],
    beta: float,
) -> Float[Tensor, " images"]:
    """[a·‖x̂⁺ - x‖²/n⁺ + (1 - a)·‖x̂⁻ - x‖²/n⁻] / β: means over values, n detached means of |x̂ - x|.

    x̂⁺ = (1 - β)·x̂_old + β·x̂_θ and x̂⁻ = (1 + β)·x̂_old - β·x̂_θ. `clean` and `old` are predictions of
    the policy and of the old policy from the same noised `image`, which the old policy sampled.
    """
    toward = (1 - beta) * old + beta * clean - image
    away = (1 + beta) * old - beta * clean - image
    return (positive * _normalised(toward) + (1 - positive) * _normalised(away)) / beta


def old_decay(iteration: int, rate: float, limit: float) -> float:
    """d of the update old ← d·old + (1 - d)·θ after an iteration: min(i·rate, limit)."""
    return min(iteration * rate, limit)


def _normalised(difference: Float[Tensor, "images ..."]) -> Float[Tensor, " images"]:
    flat = difference.flatten(1)
    distance = flat.detach().abs().mean(1).clamp(min=1e-5)
    return flat.square().mean(1) / distance


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class NftConfig(NoisedGroupConfig):
    """DiffusionNFT, `kind = "nft"`.

    `beta` is β of the two implicit policies, `max_advantage` A_max, `kl` the weight of the squared
    distance to the weights at the start. After iteration i, old ← d·old + (1 - d)·θ with
    d = min(i·`decay_rate`, `decay_limit`).
    """

    kind: Literal["nft"] = "nft"
    beta: Positive = 1.0
    max_advantage: Positive = 5.0
    kl: NonNegative = 1e-4
    decay_rate: NonNegative = 1e-3
    decay_limit: Fraction = 0.5

    def build(self, context: StageContext) -> Nft:
        return Nft(self, context)


class Nft(ImageGroupMethod):
    """`nft_loss` at a random t of each image, with the old policy's prediction."""

    config: NftConfig

    def __init__(self, config: NftConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.old = self.keep(TwinState("old", self.model))
        self.reference = self.reference_copy(bool(config.kl))

    @property
    def sampler(self) -> NeoUnify:
        return self.old.model

    def share_loss(self, share: Share[ImageRollout], step: TrainStep) -> Float[Tensor, " images"]:
        config, rollout, chosen = self.config, share.rollout, share.chosen
        images = self.noisy_images(share)
        image = rollout.final[chosen]
        t = config.draw_t(len(chosen), self.generator).to(image.device)
        noise = torch.randn(image.shape, generator=self.generator).to(image.device)
        z = noised(image, noise, t.view(-1, 1, 1), images.sigma)
        clean = images.clean(self.model, z, t)
        with torch.no_grad():
            old = images.clean(self.old.model, z, t)
        positive = positive_share(share.advantages, config.max_advantage)
        loss = nft_loss(clean, old, image, positive, config.beta)
        moved = (clean.detach() - old).square().mean()
        self.metrics.add("distance_old", float(moved), len(chosen))
        if self.reference is not None:
            with torch.no_grad():
                there = images.clean(self.reference.model, z, t)
            distance = (clean - there).square().flatten(1).mean(1)
            self.metrics.add("distance_reference", float(distance.mean().detach()), len(chosen))
            loss = loss + config.kl * distance
        return loss

    def end_iteration(self, number: int) -> None:
        decay = old_decay(number, self.config.decay_rate, self.config.decay_limit)
        move_towards(self.model, self.old.model, decay)
