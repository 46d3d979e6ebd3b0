"""Diffusion-DPO on pairs of one prompt: the better image against the worse.

Source: Diffusion-DPO (arXiv 2311.12908), with the error of a velocity, ‖x̂ - x‖²/s².
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

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
