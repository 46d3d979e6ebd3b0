"""The sparse MLP: a router sends each token to a few of many small experts."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neounify.config import MlpConfig
from neounify.model.mlp import SwiGLU


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
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        slices = x[tokens].split(counts)
        outputs = [
            expert(rows)
            for expert, rows in zip(self.experts, slices, strict=True)
            if rows.shape[0] > 0
        ]
        weighted = torch.cat(outputs) * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, tokens, weighted)
