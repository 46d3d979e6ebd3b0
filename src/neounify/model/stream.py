"""The layers: one stream's share in two callable halves, and the layer that joins the streams.

attention input    x -> q, k, v of every token          (QKVProjection)
joint attention    given from outside                   (Attend)
attention output   x, attended -> x of the next layer   (OutputMlp)

Rotary embeddings of attention cut the head dimension d into [t: d/2 | h: d/4 | w: d/4] and rotate
each part on its own, pairing channel i with i + n/2 of a part of width n (frequencies
base^(-2i/n)). Image patches pair neighbouring channels (2i, 2i+1). Angles are always computed in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from neounify.config import MlpConfig, ModelConfig
from neounify.model.parts import STREAMS, StreamName
from neounify.runtime.process import processor_vendor

_grouped_mm = getattr(functional, "grouped_mm", None)  # from torch 2.10 on
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# --- rotary embeddings ---


class Rotation(NamedTuple):
    """cos and sin of angles: of tokens [N, 1, d], sin signed, in the layout of a head; or of
    patches [N, channels / 2]."""

    cos: Tensor
    sin: Tensor


@cache
def frequencies(width: int, base: float, device: torch.device) -> Float[Tensor, " half"]:
    """base^(-2i/width) for i = 0 .. width/2 - 1, float32."""
    # The cached tensor must serve training too, whatever mode the first caller is in.
    with torch.inference_mode(False):
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return base**-exponent


def attention_rotation(
    positions: Int[Tensor, "n 3"] | Float[Tensor, "n 3"],
    head_dim: int,
    *,
    theta: float,
    theta_hw: float,
    dtype: torch.dtype,
) -> Rotation:
    """The rotation of N tokens at positions (t, h, w) for heads of `head_dim` channels."""
    parts = []
    for axis, width, base in (
        (0, head_dim // 2, theta),
        (1, head_dim // 4, theta_hw),
        (2, head_dim // 4, theta_hw),
    ):
        angle = positions[:, axis : axis + 1].float() * frequencies(width, base, positions.device)
        parts.append((angle.cos(), angle.sin()))
    # A channel's partner is added with +sin in the second half of a part and -sin in the first.
    cos = torch.cat([c for cos, _ in parts for c in (cos, cos)], dim=-1)
    sin = torch.cat([s for _, sin in parts for s in (-sin, sin)], dim=-1)
    return Rotation(cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1))


def rotate(x: Float[Tensor, "n heads d"], rotation: Rotation) -> Float[Tensor, "n heads d"]:
    """Rotate queries or keys: x · cos + partner(x) · sin."""
    quarter, eighth = x.shape[-1] // 4, x.shape[-1] // 8
    # Not `split`: its Python wrapper costs more than the rest of this function for one token.
    t1, t2, h1, h2, w1, w2 = x.split_with_sizes(
        [quarter, quarter, eighth, eighth, eighth, eighth], dim=-1
    )
    partner = torch.cat([t2, t1, h2, h1, w2, w1], dim=-1)
    return torch.addcmul(x * rotation.cos, partner, rotation.sin)


def patch_rotation(cells: Int[Tensor, "n 2"], channels: int, theta: float) -> Rotation:
    """cos and sin [N, channels / 2], float32: first half by column, second half by row.

    `cells` are (row, column) in patch units from the top left of the patch's own image.
    """
    rows, columns = cells.unbind(-1)
    freqs = frequencies(channels // 2, theta, cells.device)
    angle = torch.cat([columns[:, None].float() * freqs, rows[:, None].float() * freqs], dim=-1)
    return Rotation(angle.cos(), angle.sin())


def rotate_patches(
    x: Float[Tensor, "n channels"], rotation: Rotation
) -> Float[Tensor, "n channels"]:
    """Rotate patch features, in float32; returned in the dtype of `x`."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


# --- MLPs ---


def call_plain(module: nn.Module, x: Tensor, other: Any) -> Any:
    """A module called as it is: a half of a stream, or the experts of a layer."""
    return module(x, other)


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x), without biases."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Float[Tensor, "n size"]) -> Float[Tensor, "n size"]:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMlp(nn.Module):
    """Weighted sum of the top-k experts of each token.

    Weights are the softmax over all experts (float32), cut to the top k and,
    with `normalise_top_k`, rescaled to sum to one. `call` is how it calls its experts, with rows in
    the order of the experts and the ends of their slices.
    """

    call: Callable[[nn.Module, Tensor, Tensor], Tensor] = staticmethod(call_plain)

    def __init__(self, size: int, config: MlpConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        self.normalise_top_k = config.normalise_top_k
        self.router = nn.Linear(size, config.num_experts, bias=False)
        self.experts: Experts | StackedExperts = Experts(
            SwiGLU(size, config.expert_width) for _ in range(config.num_experts)
        )

    def route(self, x: Float[Tensor, "n size"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Weights (float32) and numbers of each token's experts, best first."""
        probabilities = torch.softmax(self.router(x), dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.normalise_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, experts

    def forward(self, x: Float[Tensor, "n size"]) -> Float[Tensor, "n size"]:
        weights, experts = self.route(x)
        # Sorting the (token, expert) pairs by expert makes every expert's tokens one slice.
        chosen, order = experts.flatten().sort(stable=True)
        tokens = order // self.top_k
        numbers = torch.arange(self.router.out_features, device=x.device)
        ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
        rows = x.index_select(0, tokens)
        weighted = self.call(self.experts, rows, ends) * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, tokens, weighted)

    def stack(self) -> None:
        """Join the weights of the experts, unless they have adapters; they are then trained and
        computed as one."""
        if isinstance(self.experts, Experts) and self.experts.plain:
            self.experts = StackedExperts(self.experts)

    def unstack(self) -> bool:
        """Make each expert a module again, a view of the joined weights; whether they were."""
        if isinstance(self.experts, Experts):
            return False
        self.experts = self.experts.apart()
        return True


class Experts(nn.ModuleList):
    """The experts of a layer, each a SwiGLU: of mapped weights and with adapters."""

    @property
    def plain(self) -> bool:
        """Whether all linear layers are without adapters."""
        return all(type(layer) is nn.Linear for expert in self for layer in expert.children())

    def grouped(self, dtype: torch.dtype) -> bool:
        """Whether all run by grouped products in this dtype: here they run one by one."""
        return False

    def forward(self, rows: Float[Tensor, "m size"], ends: Int[Tensor, " experts"]) -> Tensor:
        """Each expert on its slice of the rows; `ends` are those of the slices."""
        # In training an expert without rows runs too: it has a gradient, of zero.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self[0].parameters())
        pairs = zip(self, _slices(rows, ends), strict=True)
        return torch.cat([expert(x) for expert, x in pairs if trained or x.shape[0]])


class StackedExperts(nn.Module):
    """The experts of a layer as one weight [experts, out, in] per projection.

    All run in one grouped product per projection, so that the processor need not wait to learn how
    many rows each has; where torch has none for a dtype and widths, one after the other.
    """

    gate_proj: nn.Parameter
    up_proj: nn.Parameter
    down_proj: nn.Parameter

    @torch.no_grad()
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        for name in PROJECTIONS:
            weights: list[Tensor] = [e.get_parameter(f"{name}.weight") for e in experts]
            trained = weights[0].requires_grad
            self.register_parameter(name, nn.Parameter(torch.stack(weights), trained))
            for expert in experts:  # freed here, so that memory holds one projection twice
                del expert.get_submodule(name).weight
        self.train(experts.training)

    @torch.no_grad()
    def apart(self) -> Experts:
        """The experts as modules, whose weights are views of these."""
        count, width, size = self.gate_proj.shape
        with torch.device("meta"):
            experts = Experts(SwiGLU(size, width) for _ in range(count))
        for name in PROJECTIONS:
            stack = self.get_parameter(name)
            for expert, weight in zip(experts, stack, strict=True):
                layer = expert.get_submodule(name)
                layer.register_parameter("weight", nn.Parameter(weight, stack.requires_grad))
        return experts.train(self.training)

    def grouped(self, dtype: torch.dtype) -> bool:
        """Whether all run by grouped products in this dtype."""
        return may_group(dtype, self.gate_proj.shape[-1], self.down_proj.shape[-1])

    def forward(self, rows: Float[Tensor, "m size"], ends: Int[Tensor, " experts"]) -> Tensor:
        """SwiGLU of every expert on its slice of the rows, as `SwiGLU.forward`."""
        return run_experts(rows, ends, self.gate_proj, self.up_proj, self.down_proj)


def run_experts(
    rows: Float[Tensor, "m size"],
    ends: Int[Tensor, " experts"],
    gate: Float[Tensor, "experts width size"],
    up: Float[Tensor, "experts width size"],
    down: Float[Tensor, "experts size width"],
) -> Float[Tensor, "m size"]:
    """SwiGLU of stacked experts, each on its slice of the rows; `ends` are those of the slices."""
    dtype = product_dtype(rows)
    if not may_group(dtype, gate.shape[-1], down.shape[-1]):
        parts = zip(_slices(rows, ends), gate.unbind(), up.unbind(), down.unbind(), strict=True)
        return torch.cat([_swiglu(x, *weights) for x, *weights in parts])
    x, gate, up, down = (tensor.to(dtype) for tensor in (rows, gate, up, down))
    inner = silu(grouped_product(x, gate, ends)) * grouped_product(x, up, ends)
    return grouped_product(inner, down, ends)


def grouped_product(
    x: Float[Tensor, "m k"], weights: Float[Tensor, "experts n k"], ends: Int[Tensor, " experts"]
) -> Float[Tensor, "m n"]:
    """x Wᵀ, each slice of rows by its expert; for what `may_group` allows."""
    assert _grouped_mm is not None
    return _grouped_mm(x, weights.transpose(1, 2), offs=ends)


def may_group(dtype: torch.dtype, *widths: int) -> bool:
    """Whether grouped products serve this dtype and rows of these widths."""
    return (
        _grouped_mm is not None
        and dtype in GROUPED_DTYPES
        and all(width * dtype.itemsize % 16 == 0 for width in widths)
    )


def _slices(rows: Tensor, ends: Int[Tensor, " experts"]) -> list[Tensor]:
    """The rows of each expert."""
    return [rows[start:stop] for start, stop in pairwise([0, *ends.tolist()])]


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of matrix products with these rows: under autocast, that of autocast."""
    device = rows.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return rows.dtype
    return torch.get_autocast_dtype(device)


ONEDNN_PRODUCTS = 2_000_000
"""Multiply-adds from which a call of oneDNN, which takes 10 µs more, is faster than one of MKL."""


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's float32 products are faster than MKL's, torch's own choice.

    On processors of AMD with AVX-512, which MKL does not use there (docs/log.md).
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and processor_vendor() == "AuthenticAMD" and torch.backends.mkldnn.is_available()


def frozen_linear(layer: nn.Linear, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
    """A linear layer, by oneDNN where the product is large, in float32, and not differentiated."""
    weight = layer.weight
    if (
        x.numel() * weight.shape[0] < ONEDNN_PRODUCTS
        or not x.dtype == weight.dtype == torch.float32
        or not x.is_cpu
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return linear(x, weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, layer.bias, "none", [], "")


# --- halves of a stream, and the layer ---


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
    of the heads. `head_weights` [heads + kv_heads, d] are the joined weights of the head norms, of
    a fused module.
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
        self.head_weights: Tensor | None
        self.register_buffer("head_weights", None, persistent=False)

    def forward(self, x: Float[Tensor, "n size"], rotation: Rotation) -> Projected:
        x, d = self.input_norm(x), self.head_dim
        # In this order dropout of adapters is drawn and gradients of x are summed: a saved run
        # continues to the same bits.
        v, q, k = self.v_proj(x), self.q_proj(x), self.k_proj(x)
        counts = [q.shape[-1] // d, k.shape[-1] // d]
        # Queries and keys go together: for a single token the number of operators counts.
        halves = torch.cat([q, k], dim=-1).view(-1, sum(counts), 2, d // 2)
        heads = normalise(halves, self.q_norm.eps).flatten(2)
        weights = self.head_weights
        if weights is None or self.q_norm.weight.requires_grad:
            weights = self._join_norms(*counts)
        q, k = rotate(heads * weights, rotation).split_with_sizes(counts, dim=1)
        return Projected(q, k, v.view(-1, counts[1], d))

    @torch.no_grad()
    def fuse(self) -> None:
        """Join the weights of the head norms once, for frozen ones.

        They must not be changed in place from then on. `train()` and `load_state_dict` undo it.
        """
        counts = [linear.weight.shape[0] // self.head_dim for linear in (self.q_proj, self.k_proj)]
        self.head_weights = self._join_norms(*counts)

    def unfuse(self) -> None:
        self.head_weights = None

    def train(self, mode: bool = True) -> QKVProjection:
        if mode:
            self.unfuse()
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.unfuse()
        super()._load_from_state_dict(*arguments)

    def _join_norms(self, heads: int, kv_heads: int) -> Float[Tensor, "all_heads d"]:
        queries = torch.cat([self.q_norm.weight, self.q_norm_hw.weight])
        keys = torch.cat([self.k_norm.weight, self.k_norm_hw.weight])
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
        return x + self.mlp(self.post_norm(x)).to(x.dtype)


class Stream(nn.Module):
    """Both halves of one stream in one layer."""

    def __init__(self, config: ModelConfig, mlp: MlpConfig, layer: int) -> None:
        super().__init__()
        self.qkv = QKVProjection(config)
        self.out = OutputMlp(config, mlp, layer)


class Layer(nn.ModuleDict):
    """One Stream per name, joined by one attention. A call may leave streams out.

    With `recompute` the layer keeps its input only and computes its activations again in the
    backward pass (Chen et al. 2016). `call` is how it calls the halves of its streams.
    """

    recompute = False
    call: Callable[[nn.Module, Tensor, Any], Any] = staticmethod(call_plain)

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__({name: Stream(config, config.mlps[name], number) for name in STREAMS})
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
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, hidden, rotations, attend, use_reentrant=False)
        return self._run(hidden, rotations, attend)

    def _run(
        self,
        hidden: Mapping[StreamName, Tensor],
        rotations: Mapping[StreamName, Rotation],
        attend: Attend,
    ) -> dict[StreamName, Tensor]:
        call = self.call
        projected = {name: call(self[name].qkv, x, rotations[name]) for name, x in hidden.items()}
        attended = attend(self.number, projected)
        return {name: call(self[name].out, x, attended[name]) for name, x in hidden.items()}
