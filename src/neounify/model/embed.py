"""Embeddings of image patches, and of a scalar per image: the time t and the noise scale.

Pixels become tokens by a patch convolution, a rotation by place and a merging convolution. Both
convolutions have stride = kernel, so each is a matrix product on patches that are already cut out;
any number of images of any size goes through one call.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from neounify.config import ModelConfig
from neounify.model.rope import rotate_patches


class PatchProjection(nn.Conv2d):
    """A convolution with stride = kernel, applied to patches that are cut out: [n, c·k·k] in."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__(channels, width, kernel, stride=kernel)

    def forward(self, patches: Float[Tensor, "n ckk"]) -> Float[Tensor, "n width"]:
        return linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """One stream's image embedding; D is the model's width, P and M patch and merge side."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, patch, merge = config.vision_hidden_size, config.patch_size, config.merge
        self.patch = PatchProjection(config.channels, hidden, patch)
        self.merge = PatchProjection(hidden, config.hidden_size, merge)
        self.theta = config.rope_theta_vision

    def forward(
        self, patches: Float[Tensor, "n mm cpp"], places: Int[Tensor, "n mm 2"]
    ) -> Float[Tensor, "n d"]:
        """Embed N tokens of M·M patches each.

        `patches` holds pixels in order (channel, row, column); `places` the (row,
        column) of each patch in its image, in patch units.
        """
        rows, columns = places.flatten(0, 1).unbind(-1)
        x = gelu(self.patch(patches.flatten(0, 1)))
        x = rotate_patches(x, rows, columns, self.theta)
        # The order of the merging convolution's weight.
        return self.merge(rearrange(x, "(n mm) hidden -> n (hidden mm)", n=patches.shape[0]))


def token_patches(
    image: Float[Tensor, "c height width"], patch: int, merge: int
) -> Float[Tensor, "n mm cpp"]:
    """Cut one image into tokens of merge × merge patches, pixels as (channel, row, column)."""
    cut = "c (h m1 p1) (w m2 p2) -> (h w) (m1 m2) (c p1 p2)"
    return rearrange(image, cut, m1=merge, m2=merge, p1=patch, p2=patch)


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
