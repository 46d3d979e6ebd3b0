"""The MLPs: dense and gated, or sparse with a router that sends each token to a few experts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu

from neounify.config import MlpConfig

_grouped_mm = getattr(functional, "grouped_mm", None)  # from torch 2.10 on
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


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
    with `normalise_top_k`, rescaled to sum to one.
    """

    def __init__(self, size: int, config: MlpConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        self.normalise_top_k = config.normalise_top_k
        self.router = nn.Linear(size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGLU(size, config.expert_width) for _ in range(config.num_experts)
        )
        self._stacked: dict[str, Tensor] = {}

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
        order = experts.flatten().argsort(stable=True)
        tokens = order // self.top_k
        counts = experts.flatten().bincount(minlength=len(self.experts))
        rows = x.index_select(0, tokens)
        run = self._run_stacked if self._is_stacked() else self._run_each
        weighted = run(rows, counts) * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, tokens, weighted)

    @torch.no_grad()
    def stack(self) -> None:
        """Move the experts' weights into one tensor per projection, which they become views of.

        Then all experts run in one grouped product each, and the processor need not wait for the
        device to learn how many tokens each expert has. For frozen weights on an accelerator.
        """
        if _grouped_mm is None:
            return
        for name in PROJECTIONS:
            linears = [expert.get_submodule(name) for expert in self.experts]
            stacked = torch.stack([linear.get_parameter("weight") for linear in linears])
            for linear, weight in zip(linears, stacked, strict=True):
                linear.get_parameter("weight").data = weight
            self._stacked[name] = stacked

    def _is_stacked(self) -> bool:
        """Whether the first and last experts' weights still are views, and plain linear layers."""
        if not self._stacked:
            return False
        for name, stacked in self._stacked.items():
            for number in (0, len(self.experts) - 1):
                linear = self.experts[number].get_submodule(name)
                weight = linear.get_parameter("weight")
                same = weight.data_ptr() == stacked[number].data_ptr()
                if type(linear) is not nn.Linear or weight.requires_grad or not same:
                    return False
        return True

    def _run_stacked(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up, down = (self._stacked[name].transpose(1, 2) for name in PROJECTIONS)
        assert _grouped_mm is not None
        inner = silu(_grouped_mm(rows, gate, offs=ends)) * _grouped_mm(rows, up, offs=ends)
        return _grouped_mm(inner, down, offs=ends)

    def _run_each(self, rows: Tensor, counts: Tensor) -> Tensor:
        slices = rows.split(counts.tolist())
        pairs = zip(self.experts, slices, strict=True)
        return torch.cat([expert(own) for expert, own in pairs if own.shape[0] > 0])
