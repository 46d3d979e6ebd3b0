"""Embeddings of a scalar per image: the time t, and the noise scale."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

NUM_FEATURES = 256


def sinusoids(values: Float[Tensor, " n"]) -> Float[Tensor, "n 256"]:
    """[cos(v·f), sin(v·f)] with f_i = 10000^(-i/128), float32; v is used as it is, in [0, 1]."""
    half = NUM_FEATURES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angle = values.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class ScalarEmbed(nn.Module):
    """Sinusoids, then Linear, SiLU, Linear to the model's width."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(NUM_FEATURES, size)
        self.linear2 = nn.Linear(size, size)

    def forward(
        self, values: Float[Tensor, " n"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n size"]:
        """Embeddings in `dtype`, that of the model's activations."""
        features = sinusoids(values).to(dtype)
        return self.linear2(silu(self.linear1(features)))
