"""Embeddings of pixels and scalars.

Pixels become tokens by a patch convolution, a rotation by place and a merging convolution. Both
convolutions have stride = kernel, so each is a matrix product on patches that are already cut out;
any number of images of any size goes through one call. Other families have one Linear instead. A
row of pixels is a token's C×C block in order (row, column, channel), a tube F frames of it in order
(frame, row, column, channel). Values are in about [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from neounify.config import ModelConfig
from neounify.model.layout import StreamRows, grid_patches, stills
from neounify.model.stream import Rotation, patch_rotation, rotate_patches


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
        self.sides = {"m1": merge, "m2": merge, "p1": patch, "p2": patch, "c": config.channels}
        self.rotation = merge, hidden, config.rope_theta_vision
        self.clips_are_images = config.clips_are_images

    def forward(self, pixels: Float[Tensor, "n ccc"], rows: StreamRows) -> Float[Tensor, "n d"]:
        """Embed the tokens of all images of a stream, pixels in order (row, column, channel)."""
        # M·M patches of (channel, row, column), the order of the patch convolution's weight.
        cut = "n (m1 p1 m2 p2 c) -> (n m1 m2) (c p1 p2)"
        x = gelu(self.patch(rearrange(pixels, cut, **self.sides)))
        x = rotate_patches(x, self._rotation(rows, pixels.device))
        # The order of the merging convolution's weight.
        return self.merge(rearrange(x, "(n mm) hidden -> n (hidden mm)", n=pixels.shape[0]))

    def _rotation(self, rows: StreamRows, device: torch.device) -> Rotation:
        """Rotation of every patch by its place, made once for the layout."""
        merge, hidden, theta = self.rotation

        def make() -> Rotation:
            grids = stills(rows.grids) if self.clips_are_images else rows.grids_of("image")
            cells = grid_patches(grids, merge, device).flatten(0, 1)
            return patch_rotation(cells, hidden, theta)

        return rows.derived(("patches", *self.rotation, device), make)


class PixelEmbed(nn.Module):
    """One stream's image embedding: one Linear over the pixels of a token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.token_width, config.hidden_size)

    def forward(self, pixels: Float[Tensor, "n ccc"], rows: StreamRows) -> Float[Tensor, "n d"]:
        """`rows` are not needed: where a token stands does not enter its embedding."""
        return self.proj(pixels)


class TubeEmbed(nn.Module):
    """One stream's video embedding: one Linear over the pixels of a tube."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.tube_width, config.hidden_size)

    def forward(self, tubes: Float[Tensor, "n fccc"]) -> Float[Tensor, "n d"]:
        return self.proj(tubes)


PATCH_EMBEDS: Mapping[str, type[nn.Module]] = {"conv": PatchEmbed, "linear": PixelEmbed}
"""Image embeddings by `ModelConfig.patch_embed`."""


NUM_FEATURES = 256


@cache
def sinusoid_frequencies(device: torch.device) -> Float[Tensor, " 128"]:
    """10000^(-i/128), float32."""
    half = NUM_FEATURES // 2
    with torch.inference_mode(False):
        exponent = torch.arange(half, dtype=torch.float32, device=device) / half
        return torch.exp(-math.log(10_000) * exponent)


def sinusoids(values: Float[Tensor, " n"]) -> Float[Tensor, "n 256"]:
    """[cos(v·f), sin(v·f)] with f_i = 10000^(-i/128), float32; v is used as it is, in [0, 1]."""
    angle = values.float()[:, None] * sinusoid_frequencies(values.device)
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
