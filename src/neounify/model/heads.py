"""Heads that turn states into pixels: one row per token.

A row is a token's C×C block in order (row, column, channel), a tube F frames of it in order (frame,
row, column, channel). Values are in about [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, pixel_shuffle

from neounify.config import ModelConfig
from neounify.image.pixels import patchify
from neounify.model.layout import Grid
from neounify.model.stream import RMSNorm


class FlowHead(nn.Module):
    """Each token alone: Linear, GELU, Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.flow_head_width)
        self.linear2 = nn.Linear(config.flow_head_width, config.token_width)

    def forward(
        self, hidden: Float[Tensor, "n d"], grids: Sequence[Grid]
    ) -> Float[Tensor, "n ccc"]:
        """`grids` of the images is not needed: tokens stand alone."""
        return self.linear2(gelu(self.linear1(hidden)))


class LinearHead(nn.Module):
    """Each token alone: RMSNorm, Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.linear = nn.Linear(config.hidden_size, config.token_width)

    def forward(
        self, hidden: Float[Tensor, "n d"], grids: Sequence[Grid]
    ) -> Float[Tensor, "n ccc"]:
        """`grids` of the images is not needed: tokens stand alone."""
        return self.linear(self.norm(hidden))


class TubeHead(nn.Module):
    """Each tube alone: RMSNorm, Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.linear = nn.Linear(config.hidden_size, config.tube_width)

    def forward(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n fccc"]:
        return self.linear(self.norm(hidden))


class PixelHead(nn.Module):
    """Convolutions over the whole token map, so that neighbouring tokens meet without a seam."""

    WIDTH = 1024

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_size, self.channels = config.token_size, config.channels
        self.last_shuffle = config.token_size // 4  # two shuffles by 2 come before it
        self.conv1 = nn.Conv2d(config.hidden_size // 4, self.WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(
            self.WIDTH // 4, config.channels * self.last_shuffle**2, 3, padding=1
        )

    def forward(
        self, hidden: Float[Tensor, "n d"], grids: Sequence[Grid]
    ) -> Float[Tensor, "n ccc"]:
        """`grids` are those of the images, in the order of `hidden`."""
        pieces = []
        start = 0
        for grid, same in groupby(grids):
            count = len(list(same))
            stop = start + count * grid.length
            maps = rearrange(
                hidden[start:stop], "(b h w) d -> b d h w", h=grid.rows, w=grid.columns
            )
            pieces.append(
                patchify(self._decode(maps), self.token_size, self.channels).flatten(0, 1)
            )
            start = stop
        return torch.cat(pieces)

    def _decode(self, maps: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        x = gelu(self.conv1(pixel_shuffle(maps, 2)))
        x = self.conv2(pixel_shuffle(x, 2))
        return pixel_shuffle(x, self.last_shuffle)


IMAGE_HEADS: Mapping[str, type[nn.Module]] = {
    "flow": FlowHead,
    "pixel": PixelHead,
    "linear": LinearHead,
}
"""Image heads by `ModelConfig.image_head`."""
