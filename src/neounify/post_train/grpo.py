"""Flow-GRPO: policy gradients over the random steps of a sampler.

The ratio of two policies is that of means over the D values of an image, the true one to the power
1/D, so clip ranges are tiny: 1e-4 to 4e-6.

Sources: Flow-GRPO (arXiv 2505.05470), GRPO-Guard (2510.22319), Flow-DPPO (2606.11025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.flow.sde import GaussianStep


@dataclass(frozen=True, eq=False, kw_only=True)
class PolicyTerms:
    """Loss of a random step of some images, and what of it is logged; all [images].

    `log_ratio` is ℓ_θ - ℓ_old, with the guard its guarded form; `divergence` is b between both.
    """

    loss: Tensor
    log_ratio: Tensor
    divergence: Tensor
    clipped: Tensor
    """Whether the clip range or the KL mask took the image's gradient away, bool."""


def policy_terms(
    step: GaussianStep,
    clean: Float[Tensor, "images ..."],
    old: Float[Tensor, "images ..."],
    noise: Float[Tensor, "images ..."],
    advantage: Float[Tensor, " images"],
    *,
    clip: float,
    guard: bool = False,
    kl_mask: float | None = None,
) -> PolicyTerms:
    """max(-Aρ, -A·clip(ρ, 1 - c, 1 + c)) with ρ = exp(ℓ_θ - ℓ_old).

    `clean` is x̂ of the policy, `old` of the one that sampled with `noise`, both behind z of the
    step. `guard` takes ρ = exp((ℓ_θ - ℓ_old + b)·w/σ), whose mean is 1 and whose spread is the
    same in all steps. With `kl_mask` δ the clip is replaced by Flow-DPPO's rule: an image is left
    out once b > δ and the update moves it further away (A > 0 and ρ > 1, or A < 0 and ρ < 1).
    """
    measure = step.guarded_log_ratio if guard else step.log_ratio
    log_ratio = measure(noise, clean, old)
    divergence = step.divergence(clean, old)
    ratio = log_ratio.exp()
    moves_away = torch.where(advantage > 0, ratio > 1, ratio < 1)
    unclipped = -advantage * ratio
    if kl_mask is None:
        loss = torch.maximum(unclipped, -advantage * ratio.clamp(1 - clip, 1 + clip))
        clipped = moves_away & ((ratio - 1).abs() > clip)
    else:
        clipped = moves_away & (divergence > kl_mask)
        loss = torch.where(clipped, unclipped.detach(), unclipped)
    return PolicyTerms(
        loss=loss,
        log_ratio=log_ratio.detach(),
        divergence=divergence.detach(),
        clipped=clipped & (advantage != 0),
    )
