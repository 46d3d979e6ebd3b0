"""Advantages of rewarded groups, and the clipped objective of policy gradients."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_ADVANTAGE = 5.0
EPS = 1e-4
Scope = Literal["iteration", "group"]


def group_advantages(
    rewards: Float[Tensor, "prompts group"], scope: Scope = "iteration"
) -> Float[Tensor, "prompts group"]:
    """A = (r - mean of the group) / (std + 1e-4), within ±5 (Flow-GRPO, arXiv 2505.05470).

    `scope` is what the standard deviation is taken over: all rewards of the iteration, or each
    group, which blows up groups of 0/1 rewards with a single other one. NaN marks a sample that has
    no reward: it is left out of the statistics and its advantage is 0. A group whose rewards are
    all alike has advantages of 0.
    """
    present = ~rewards.isnan()
    count = present.sum(1, keepdim=True)
    values = rewards.nan_to_num()
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(present, values - mean, 0.0)
    centred = torch.where(informative(rewards)[:, None], centred, 0.0)
    if scope == "group":
        std = (centred.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
    else:
        overall = rewards[present]
        std = overall.std(correction=0) if len(overall) else torch.zeros(())
    return (centred / (std + EPS)).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)


def informative(rewards: Float[Tensor, "prompts group"]) -> Tensor:
    """Whether the rewards of a group differ, [prompts] bool; NaN is no reward."""
    high = rewards.nan_to_num(nan=-torch.inf).amax(1)
    low = rewards.nan_to_num(nan=torch.inf).amin(1)
    return high > low


def clipped_objective(
    ratio: Float[Tensor, " n"], advantage: Float[Tensor, " n"], clip: float
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """max(-Aρ, -A·clip(ρ, 1 - c, 1 + c)), and where the clip takes the gradient away."""
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    moves_away = torch.where(advantage > 0, ratio > 1, ratio < 1)
    clipped = moves_away & ((ratio - 1).abs() > clip) & (advantage != 0)
    return loss, clipped.detach()
