"""One stream's share of a layer, and the layer that joins two of them in attention."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neounify.config import MlpConfig, ModelConfig
from neounify.model.attention import Projected
from neounify.model.mlp import SwiGLU
from neounify.model.moe import SparseMlp
from neounify.model.norm import RMSNorm, normalise
from neounify.model.rope import Rotation, rotate

Attend = Callable[[Projected | None, Projected | None], tuple[Tensor | None, Tensor | None]]


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


class Layer(nn.Module):
    """Two streams, one attention. Either stream may be absent from a call."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.und = Stream(config, config.und_mlp, layer)
        self.gen = Stream(config, config.gen_mlp, layer)

    def forward(
        self,
        und: Float[Tensor, "u size"] | None,
        gen: Float[Tensor, "g size"] | None,
        und_rotation: Rotation | None,
        gen_rotation: Rotation | None,
        attend: Attend,
    ) -> tuple[Float[Tensor, "u size"] | None, Float[Tensor, "g size"] | None]:
        und_qkv = gen_qkv = None
        if und is not None and und_rotation is not None:
            und_qkv = self.und.project(und, und_rotation)
        if gen is not None and gen_rotation is not None:
            gen_qkv = self.gen.project(gen, gen_rotation)
        und_seen, gen_seen = attend(und_qkv, gen_qkv)
        if und is not None and und_seen is not None:
            und = self.und.finish(und, und_seen)
        if gen is not None and gen_seen is not None:
            gen = self.gen.finish(gen, gen_seen)
        return und, gen
