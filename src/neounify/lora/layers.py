"""Low-rank adapters on the linear layers of a model.

    y = W x + b + scale · B A dropout(x)      A [r, in], B [out, r], B = 0 at first

with scale = alpha / r, or alpha / √r (Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023,
arXiv 2312.03732).
"""

from __future__ import annotations

import math

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from neounify.checkpoint.names import stream_of
from neounify.errors import ConfigError
from neounify.model.neo import NeoUnify
from neounify.settings import STRICT

HALVES = (".lora_A", ".lora_B")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Which linear layers get adapters, and how large.

    `modules` are the last parts of module names: q_proj, k_proj, v_proj, o_proj, gate_proj,
    up_proj, down_proj, router, linear1, linear2, lm_head; `streams` of und and gen
    (lm_head belongs to neither and is chosen by its name alone).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    streams: tuple[str, ...] = ("und", "gen")
    modules: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora: rank {self.rank} and alpha {self.alpha} must be above 0, "
                f"dropout {self.dropout} within 0 to 1"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; `weight` and `bias` keep their names and are frozen."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.scale, config.dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = linear(dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return super().forward(x) + linear(low, self.lora_B.to(x.dtype)) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the adapter added to its weight, in float32, cast once."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.float().addmm(self.lora_B, self.lora_A, alpha=self.scale)
        plain.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        plain.bias = self.bias
        return plain


def add_lora(model: NeoUnify, config: LoraConfig, seed: int = 0) -> list[str]:
    """Put adapters on the chosen layers and freeze all else; the names of the layers.

    Raises ConfigError when nothing is chosen.
    """
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in config.modules
        and stream_of(f"{name}.weight") in (*config.streams, "shared")
    ]
    if not chosen:
        raise ConfigError(f"lora: no layer is one of {config.modules} in {config.streams}")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in chosen:
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            model.set_submodule(name, LoraLinear(base, config))
    return chosen


def merge_lora(model: NeoUnify) -> None:
    """Fold all adapters into the weights; the model is plain again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            model.set_submodule(name, module.merged())


def weight_name(parameter: str) -> str:
    """The name of the weight that an adapter's parameter belongs to; others are as they are."""
    for half in HALVES:
        if parameter.endswith(half):
            return parameter.removesuffix(half) + ".weight"
    return parameter
