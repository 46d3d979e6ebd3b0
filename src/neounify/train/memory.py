"""Memory of a training stage on each of many devices, from formulas, before anything is loaded.

Bytes per parameter, Φ for trained and φ for frozen ones; a frozen stream that no batch calls is in
host memory and does not count:

    states    (20 Φ + 4 φ) / all ranks but copies      weight, gradient and EMA 4 each, AdamW 8
              (Muon 4: 16 Φ; EMA in host memory: 4 Φ less); 2 φ with
              frozen weights in bfloat16
    adapters  20 per parameter, whole on every device; the weights beside them are frozen
    unit      4 (Φ + φ) + 6 Φ of the largest layer: it and the next one gathered in bfloat16, its
              gradient and the reduction of it; in float32 8 (Φ + φ) + 8 Φ; of experts 1 / expert
    root      2 (Φ + φ) of what stands outside the layers, 4 in float32
    inputs    rows · D · 4 · layers      with activation checkpointing; 2 for a bfloat16 residual
    layer     what one layer keeps for its backward pass; of all layers without checkpointing

A layer keeps for a row about 10 widths of the queries, 2 of the keys, and 4 of the MLP; an expert
keeps its input and output too. Rows are taken to be spread evenly over experts that are dealt out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from neounify.checkpoint.names import part_of, stream_of
from neounify.config import ModelConfig
from neounify.distributed.mesh import MeshShape
from neounify.lora.layers import LoraConfig, add_lora
from neounify.model.build import meta_model
from neounify.model.parts import STREAMS
from neounify.train.recipe import StageRecipe
from neounify.train.setup import freeze
from neounify.train.supervised import SupervisedConfig

GB = 1e9
ONE_DEVICE = MeshShape()
LIBRARIES = 4 * GB
"""Bytes of a device that contexts, kernels and fragments take."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on each device; counts of parameters and `states` are of all devices."""

    trained: int
    frozen: int
    states: float
    unit: float
    root: float
    inputs: float
    layer: float
    adapters: float = 0.0

    @property
    def rest(self) -> float:
        """Bytes that no degree of sharding makes less."""
        return self.unit + self.root + self.inputs + self.layer + self.adapters

    def on(self, shard: int) -> float:
        """Bytes of each of `shard` devices."""
        return self.states / shard + self.rest

    def fitting(self, device: float) -> int | None:
        """The least degree of sharding that fits devices of so many bytes; None if none does."""
        left = device - LIBRARIES - self.rest
        return max(1, -int(-self.states // left)) if left > 0 else None


def stage_memory(
    config: ModelConfig, stage: StageRecipe, shape: MeshShape = ONE_DEVICE
) -> StageMemory:
    """The memory of a supervised stage; of a mesh the axes that cut units and rows count.

    Raises ConfigError for names to freeze, or to adapt, that are unknown.
    """
    assert isinstance(stage.method, SupervisedConfig)
    model = _model(config)
    adapters = 0
    if stage.lora is None:
        freeze(model, stage.freeze, stage.freeze_last_layers)
    else:
        adapters = _adapters(config, stage.lora)
        model.requires_grad_(False)
    unused = stage.method.unused_streams(stage)
    present = {n: p for n, p in model.named_parameters() if stream_of(n) not in unused}
    in_layers: list[dict[str, nn.Parameter]] = [{} for _ in model.layers]
    root = 0
    for name, parameter in present.items():
        if name.startswith("layers."):
            in_layers[int(name.split(".")[1])][name] = parameter
        else:
            root += parameter.numel()
    trained, frozen = _counts(present)
    half = stage.precision == "bfloat16"
    gathered, reduced = (4, 6) if half else (8, 8)
    units = (_counts(parameters, shape.expert) for parameters in in_layers)
    rows = -(-stage.method.tokens_per_pack // shape.sequence)
    layer = max(_kept(config, number) for number in range(config.num_layers)) * rows
    layer *= 2 if half else 4
    inputs = rows * config.hidden_size * config.num_layers * _bytes_of(stage.residual)
    if not stage.checkpoint_activations:
        inputs, layer = 0, layer * config.num_layers
    return StageMemory(
        trained=trained + adapters,
        frozen=frozen,
        states=_state_bytes(stage) * trained + _bytes_of(stage.frozen_weights) * frozen,
        unit=max(gathered * (t + f) + reduced * t for t, f in units),
        root=(2 if half else 4) * root,
        inputs=inputs,
        layer=layer,
        adapters=_state_bytes(stage) * adapters,
    )


_model = lru_cache(maxsize=2)(meta_model)
"""Built once for the stages of a recipe."""


def _adapters(config: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of the adapters of a stage."""
    model = meta_model(config)
    add_lora(model, lora)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _state_bytes(stage: StageRecipe) -> int:
    """Bytes of weight, gradient, moments and mean of a trained parameter on the devices."""
    mean = 0 if stage.ema_memory == "host" else 4
    return 8 + (4 if stage.optimizer.name == "muon" else 8) + mean


def _bytes_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _counts(parameters: Mapping[str, nn.Parameter], expert: int = 1) -> tuple[int, int]:
    """Trained and frozen parameters, of experts the share of one rank of `expert`."""
    trained = frozen = 0
    for name, parameter in parameters.items():
        count = parameter.numel() // (expert if part_of(name) == "experts" else 1)
        if parameter.requires_grad:
            trained += count
        else:
            frozen += count
    return trained, frozen


def _kept(config: ModelConfig, number: int) -> int:
    """Values that a layer keeps for a row of the stream that keeps most."""
    attention = (10 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widths = []
    for stream in STREAMS:
        mlp = config.mlps[stream]
        expert = mlp.experts_per_token * (2 * config.hidden_size + 4 * mlp.expert_width)
        widths.append(expert if mlp.is_sparse(number) else 4 * mlp.width)
    return attention + max(widths)
