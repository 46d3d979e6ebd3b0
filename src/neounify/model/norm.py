"""Root-mean-square normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.Module):
    """y = w · x / sqrt(mean(x²) + eps) over the last axis.

    Computed in float32 and cast back before the weight is applied, as the
    published models do it (it matters in bfloat16).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        return self.weight * normalise(x, self.eps)


def normalise(x: Float[Tensor, "*rows size"], eps: float) -> Float[Tensor, "*rows size"]:
    """x / sqrt(mean(x²) + eps) over the last axis, in float32, returned in the dtype of `x`."""
    return rms_norm(x, x.shape[-1:], eps=eps)
