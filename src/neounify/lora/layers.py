"""Low-rank adapters on the linear layers of a model, and their config.

    y = W x + b + scale · B A dropout(x)      A [r, in], B [out, r], B = 0 at first

with scale = alpha / r, or alpha / √r (Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023,
arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from neounify.checkpoint.lora_file import MAX_RANK
from neounify.checkpoint.names import part_of, stream_of
from neounify.checkpoint.quantised_layers import quant_modules
from neounify.config.ranges import STRICT, BelowOne, Positive, Range
from neounify.errors import CheckpointError, ConfigError
from neounify.model.build import without_values
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS, StreamName

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
"""Of dense MLPs and of experts alike."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Adapters of rank `rank` on chosen linear layers; `scale` is the factor of B A.

    `modules` chooses by the last part of a module's name (q_proj, k_proj, v_proj, o_proj,
    gate_proj, up_proj, down_proj, router, linear1, linear2, lm_head) or by the part of the model
    it is (attention, mlp, experts, router, timestep, noise scale, image head, lm head: see
    model/parts.py), among those of `streams`; lm_head belongs to neither stream.
    `layers` = (first, stop) narrows the choice inside the layers; None takes all of them.
    `rslora` scales by alpha / √rank instead of alpha / rank. Raises ValueError.
    """

    rank: Annotated[int, AfterValidator(Range(1, MAX_RANK))] = 16
    alpha: Positive = 32.0
    dropout: BelowOne = 0.0
    rslora: bool = False
    streams: tuple[StreamName, ...] = tuple(STREAMS)
    modules: tuple[str, ...] = (*ATTENTION, *MLP)
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise ValueError("lora: modules must name at least one kind of layer")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"lora: layers {self.layers} must be (first, stop), first below stop")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


HALVES = (".lora_A", ".lora_B")


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: [..., in] to [..., out].

    `weight` and `bias` are the very parameters of the layer it stands for and keep their names.
    A and B are float32 (float64 on a float64 layer) and computed with in the input's dtype.
    """

    def __init__(
        self, base: nn.Linear, config: LoraConfig, generator: torch.Generator | None = None
    ) -> None:
        with without_values():
            super().__init__(base.in_features, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)
        self.rank, self.scale, self.dropout = config.rank, config.scale, config.dropout
        device, dtype = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        down = torch.empty(config.rank, base.in_features, device=device, dtype=dtype)
        up = torch.empty(base.out_features, config.rank, device=device, dtype=dtype)
        self.lora_A, self.lora_B = nn.Parameter(down), nn.Parameter(up)
        self.begin(generator)

    @torch.no_grad()
    def begin(self, generator: torch.Generator | None = None) -> None:
        """Give the adapter its first values: A drawn, B = 0."""
        # Drawn in float32 on the CPU, so that a seed means the same for every dtype and device.
        down = torch.empty(self.lora_A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.lora_A.copy_(down)
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        low = linear(dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return super().forward(x) + linear(low, self.lora_B.to(x.dtype)) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain, frozen layer with the merged weight."""
        with without_values():
            plain = nn.Linear(self.in_features, self.out_features, bias=False)
        weight = merged_weight(self.weight, self.lora_A, self.lora_B, self.scale)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + scale · B A of an adapter, A = `down` and B = `up`, in float32 at least, cast once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(dtype).addmm(up.to(dtype), down.to(dtype), alpha=scale)
    return merged.to(weight.dtype)


def add_lora(model: NeoUnify, config: LoraConfig, seed: int = 0) -> list[str]:
    """Put adapters on the chosen layers and freeze all else; the names of the layers.

    The outputs stay as they are until B is trained. Parameters that are to be trained beside
    the adapters can be unfrozen afterwards. Raises ConfigError when a kind of module is not
    there, or the model has adapters already.
    """
    check_plain(model)
    generator = torch.Generator().manual_seed(seed)
    with linear_experts(model):
        chosen = _choose(model, config)
        for name in chosen:
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            model.set_submodule(name, LoraLinear(base, config, generator))
    trainable_only_lora(model)
    return chosen


@contextmanager
def linear_experts(model: NeoUnify) -> Iterator[None]:
    """Experts as linear layers, which alone take adapters; those left without are joined again."""
    joined = [mlp for mlp in model.sparse_mlps if mlp.unstack()]
    yield
    for mlp in joined:
        mlp.stack()


def check_plain(model: NeoUnify) -> None:
    """Raise ConfigError where a model has adapters already, or quantised layers."""
    if quantised := quant_modules(model):
        raise ConfigError(
            f"lora: {len(quantised)} layers are quantised, and adapters are trained on plain "
            'weights; load the model with backend="decoded"'
        )
    if layers := lora_layers(model):
        raise ConfigError(
            f"lora: the model has adapters already, on {len(layers)} layers; "
            "merge_lora(model) comes first"
        )


def lora_layers(model: NeoUnify) -> dict[str, LoraLinear]:
    """The layers with adapters, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def trainable_only_lora(model: NeoUnify) -> None:
    """Freeze every parameter but the adapters'."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(HALVES))


def merge_lora(model: NeoUnify) -> None:
    """Fold all adapters into the weights; the model is plain again, those weights frozen.

    Raises CheckpointError, with the model unchanged, when weights are not in memory, as with
    memory="stream".
    """
    layers = lora_layers(model)
    absent = [name for name, layer in layers.items() if not layer.weight.numel()]
    if absent:
        raise CheckpointError(
            f"the weights of {absent[0]} are not in memory, so nothing can be merged into them; "
            'save the adapter and merge it while loading, or load with memory="all"'
        )
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged())


@contextmanager
def merged_lora(model: NeoUnify) -> Iterator[NeoUnify]:
    """The model with its adapters merged, for an export or a look in the middle of training.

    Afterwards the adapters are back, the very same objects. Holds a second copy of the weights
    that have adapters meanwhile. Raises as `merge_lora` does.
    """
    layers = lora_layers(model)
    merge_lora(model)
    try:
        yield model
    finally:
        for name, layer in layers.items():
            layer.train(model.get_submodule(name).training)
            model.set_submodule(name, layer)


def weight_name(parameter: str) -> str:
    """The name of the weight that an adapter's parameter belongs to; others are as they are."""
    for half in HALVES:
        if parameter.endswith(half):
            return parameter.removesuffix(half) + ".weight"
    return parameter


def _choose(model: NeoUnify, config: LoraConfig) -> list[str]:
    if config.layers is not None and config.layers[1] > model.config.num_layers:
        raise ConfigError(f"lora: layers {config.layers} of only {model.config.num_layers}")
    known, used, chosen = set[str](), set[str](), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        kinds = {name.rpartition(".")[2], part_of(f"{name}.weight")}
        known |= kinds
        here = stream_of(f"{name}.weight") in (*config.streams, "shared")
        if here and _in_layers(name, config.layers) and kinds & set(config.modules):
            used |= kinds
            chosen.append(name)
    unused = [kind for kind in config.modules if kind not in used]
    if unused:
        raise ConfigError(
            f"lora: no layer of streams {list(config.streams)} (layers: {config.layers or 'all'}) "
            f"is one of {unused}; linear layers of this model, which alone take adapters, are "
            f"{sorted(known)}"
        )
    return chosen


def _in_layers(name: str, layers: tuple[int, int] | None) -> bool:
    if layers is None or not name.startswith("layers."):
        return True
    return layers[0] <= int(name.split(".")[1]) < layers[1]
