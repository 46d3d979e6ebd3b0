"""One stream's share of a layer, and the layer that joins two of them in attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neounify.config import MlpConfig, ModelConfig
from neounify.model.mlp import SwiGLU
from neounify.model.moe import SparseMlp
from neounify.model.norm import RMSNorm, normalise
from neounify.model.parts import STREAMS, StreamName
from neounify.model.rope import Rotation, rotate


class Projected(NamedTuple):
    """Queries [N, heads, d], keys and values [N, kv_heads, d] of one stream, rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


Attend = Callable[[int, Mapping[StreamName, Projected]], Mapping[StreamName, Tensor]]
"""Joint attention of one layer, given by its number: what the queries [N, heads, d] of each stream
gather from the values they see. Planned once per call of the model (`neounify.attention`)."""


class Stream(nn.Module):
    """Norms, projections and MLP of one stream in one layer."""

    def __init__(self, config: ModelConfig, mlp: MlpConfig, layer: int) -> None:
        super().__init__()
        size, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, d
        eps = config.rms_norm_eps
        self.input_norm = RMSNorm(size, eps)
        self.q_proj = nn.Linear(size, self.heads * d, bias=bias)
        self.k_proj = nn.Linear(size, self.kv_heads * d, bias=bias)
        self.v_proj = nn.Linear(size, self.kv_heads * d, bias=bias)
        self.o_proj = nn.Linear(self.heads * d, size, bias=bias)
        self.q_norm = RMSNorm(d // 2, eps)
        self.q_norm_hw = RMSNorm(d // 2, eps)
        self.k_norm = RMSNorm(d // 2, eps)
        self.k_norm_hw = RMSNorm(d // 2, eps)
        self.post_norm = RMSNorm(size, eps)
        self.mlp: nn.Module
        if mlp.is_sparse(layer):
            self.mlp = SparseMlp(size, mlp)
        else:
            self.mlp = SwiGLU(size, mlp.width)

    def project(self, x: Float[Tensor, "n size"], rotation: Rotation) -> Projected:
        """Queries, keys and values of N tokens."""
        x = self.input_norm(x)
        v = self.v_proj(x).view(-1, self.kv_heads, self.head_dim)
        # Queries and keys go together: for a single token the number of operations counts.
        heads = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1)
        heads = self._norm_halves(heads.view(-1, self.heads + self.kv_heads, self.head_dim))
        q, k = rotate(heads, rotation).split_with_sizes([self.heads, self.kv_heads], dim=1)
        return Projected(q, k, v)

    def _norm_halves(self, x: Float[Tensor, "n heads d"]) -> Float[Tensor, "n heads d"]:
        """One norm over the half that is rotated by t, one over the half rotated by h and w."""
        q = torch.cat([self.q_norm.weight, self.q_norm_hw.weight])
        k = torch.cat([self.k_norm.weight, self.k_norm_hw.weight])
        weight = torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])
        halves = normalise(x.view(*x.shape[:2], 2, -1), self.q_norm.eps)
        return halves.view(x.shape) * weight

    def finish(
        self, x: Float[Tensor, "n size"], attended: Float[Tensor, "n heads d"]
    ) -> Float[Tensor, "n size"]:
        """Add what attention gathered, then the MLP."""
        x = x + self.o_proj(attended.flatten(1))
        return x + self.mlp(self.post_norm(x))


class Layer(nn.ModuleDict):
    """One module per stream, joined by one attention. A call may leave streams out."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__({name: Stream(config, config.mlp(name), number) for name in STREAMS})
        self.number = number

    def __getitem__(self, name: str) -> Stream:
        return cast(Stream, self._modules[name])

    def forward(
        self,
        hidden: Mapping[StreamName, Tensor],
        rotations: Mapping[StreamName, Rotation],
        attend: Attend,
    ) -> dict[StreamName, Tensor]:
        """Hidden states [N, size] of each stream in, the next ones out."""
        projected = {name: self[name].project(x, rotations[name]) for name, x in hidden.items()}
        attended = attend(self.number, projected)
        return {name: self[name].finish(x, attended[name]) for name, x in hidden.items()}
