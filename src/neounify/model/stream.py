"""One stream's share of a layer, in two callable halves, and the layer that joins the streams.

attention input    x -> q, k, v of every token          (QKVProjection)
joint attention    given from outside                   (Attend)
attention output   x, attended -> x of the next layer   (OutputMlp)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from neounify.config import MlpConfig, ModelConfig
from neounify.model.moe import SparseMlp, SwiGLU
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


class QKVProjection(nn.Module):
    """Norm, projections, head norms and rotation: queries, keys and values of N tokens.

    Each head has one norm over the half that is rotated by t, and one over the half rotated by h
    and w. Head counts follow from the widths of the projections, so that a rank may hold a share
    of the heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        eps = config.rms_norm_eps
        self.head_dim = d
        self.input_norm = RMSNorm(size, eps)
        self.q_proj = nn.Linear(size, config.num_heads * d, bias=bias)
        self.k_proj = nn.Linear(size, config.num_kv_heads * d, bias=bias)
        self.v_proj = nn.Linear(size, config.num_kv_heads * d, bias=bias)
        self.q_norm = RMSNorm(d // 2, eps)
        self.q_norm_hw = RMSNorm(d // 2, eps)
        self.k_norm = RMSNorm(d // 2, eps)
        self.k_norm_hw = RMSNorm(d // 2, eps)
        self._joined: tuple[object, Tensor] | None = None

    def forward(self, x: Float[Tensor, "n size"], rotation: Rotation) -> Projected:
        x, d = self.input_norm(x), self.head_dim
        # In this order dropout of adapters is drawn and gradients of x are summed: a saved run
        # continues to the same bits.
        v, q, k = self.v_proj(x), self.q_proj(x), self.k_proj(x)
        counts = [q.shape[-1] // d, k.shape[-1] // d]
        # Queries and keys go together: for a single token the number of operators counts.
        heads = torch.cat([q, k], dim=-1).view(-1, sum(counts), d)
        halves = normalise(heads.view(-1, sum(counts), 2, d // 2), self.q_norm.eps)
        heads = rotate(halves.view(heads.shape) * self._head_weights(*counts), rotation)
        q, k = heads.split_with_sizes(counts, dim=1)
        return Projected(q, k, v.view(-1, counts[1], d))

    def _head_weights(self, heads: int, kv_heads: int) -> Float[Tensor, "heads d"]:
        """Norm weights of all query and key heads; joined once where they are frozen."""
        weights = (
            self.q_norm.weight,
            self.q_norm_hw.weight,
            self.k_norm.weight,
            self.k_norm_hw.weight,
        )
        if torch.compiler.is_compiling() or any(
            w.requires_grad or w.is_inference() for w in weights
        ):
            return _join_heads(*weights, heads, kv_heads)
        # A write in place changes the version of a weight, a replacement its address.
        key = (heads, kv_heads, *[(id(w), w.data_ptr(), w._version) for w in weights])
        if self._joined is None or self._joined[0] != key:
            with torch.inference_mode(False):
                self._joined = key, _join_heads(*weights, heads, kv_heads)
        return self._joined[1]


def _join_heads(
    q: Tensor, q_hw: Tensor, k: Tensor, k_hw: Tensor, heads: int, kv_heads: int
) -> Float[Tensor, "heads d"]:
    queries, keys = torch.cat([q, q_hw]), torch.cat([k, k_hw])
    return torch.cat([queries.expand(heads, -1), keys.expand(kv_heads, -1)])


class OutputMlp(nn.Module):
    """x + o(attended), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mlp: MlpConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.o_proj = nn.Linear(
            config.num_heads * config.head_dim, size, bias=config.attention_bias
        )
        self.post_norm = RMSNorm(size, config.rms_norm_eps)
        sparse = mlp.is_sparse(layer)
        self.mlp = SparseMlp(size, mlp) if sparse else SwiGLU(size, mlp.width)

    def forward(
        self, x: Float[Tensor, "n size"], attended: Float[Tensor, "n heads d"]
    ) -> Float[Tensor, "n size"]:
        x = x + self.o_proj(attended.flatten(1))
        return x + self.mlp(self.post_norm(x))


class Stream(nn.Module):
    """Both halves of one stream in one layer."""

    def __init__(self, config: ModelConfig, mlp: MlpConfig, layer: int) -> None:
        super().__init__()
        self.qkv = QKVProjection(config)
        self.out = OutputMlp(config, mlp, layer)


class Layer(nn.ModuleDict):
    """One Stream per name, joined by one attention. A call may leave streams out."""

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
        projected = {name: self[name].qkv(x, rotations[name]) for name, x in hidden.items()}
        attended = attend(self.number, projected)
        return {name: self[name].out(x, attended[name]) for name, x in hidden.items()}
