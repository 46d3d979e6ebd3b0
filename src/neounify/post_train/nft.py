"""DiffusionNFT: reinforcement learning on the forward process, without log-probabilities.

Source: DiffusionNFT (arXiv 2509.16117), for a network that predicts the clean image.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


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


def old_decay(iteration: int, rate: float = 1e-3, limit: float = 0.5) -> float:
    """d of the update old ← d·old + (1 - d)·θ after an iteration: min(i·rate, limit)."""
    return min(iteration * rate, limit)


def _normalised(difference: Float[Tensor, "images ..."]) -> Float[Tensor, " images"]:
    flat = difference.flatten(1)
    distance = flat.detach().abs().mean(1).clamp(min=1e-5)
    return flat.square().mean(1) / distance
