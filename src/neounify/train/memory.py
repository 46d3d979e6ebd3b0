"""Memory of a training stage on each of many devices, from formulas, before anything is loaded.

Bytes per parameter, Φ for trained and φ for frozen ones:

    states    (20 Φ + 4 φ) / shard       weight, gradient and EMA 4 each, AdamW 8 (Muon 4: 16 Φ)
    unit      4 (Φ + φ) + 6 Φ of the largest layer: it and the next one gathered in bfloat16, its
              gradient and the reduction of it; in float32 8 (Φ + φ) + 8 Φ
    root      2 (Φ + φ) of what stands outside the layers, 4 in float32
    inputs    rows · D · 4 · layers      with activation checkpointing, the residual being float32
    layer     what one layer keeps for its backward pass; of all layers without checkpointing

A layer keeps for a row about 10 widths of the queries, 2 of the keys, and 4 of the MLP; an expert
keeps its input and output too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from neounify.config import ModelConfig
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS
from neounify.train.recipe import StageRecipe
from neounify.train.setup import freeze
from neounify.train.supervised import SupervisedConfig

GB = 1e9
LIBRARIES = 4 * GB
"""Bytes of a device that contexts, kernels and fragments take."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on each device; `states` are those of one device that holds all."""

    trained: int
    frozen: int
    states: float
    unit: float
    root: float
    inputs: float
    layer: float

    @property
    def rest(self) -> float:
        """Bytes that no degree of sharding makes less."""
        return self.unit + self.root + self.inputs + self.layer

    def on(self, shard: int) -> float:
        """Bytes of each of `shard` devices."""
        return self.states / shard + self.rest

    def fitting(self, device: float) -> int | None:
        """The least degree of sharding that fits devices of so many bytes; None if none does."""
        left = device - LIBRARIES - self.rest
        return max(1, -int(-self.states // left)) if left > 0 else None


def stage_memory(config: ModelConfig, stage: StageRecipe, sequence: int = 1) -> StageMemory:
    """The memory of a supervised stage, the rows of a pack being cut over `sequence` devices.

    Raises ConfigError for names to freeze that are unknown.
    """
    assert isinstance(stage.method, SupervisedConfig)
    with torch.device("meta"):
        model = NeoUnify(config)
    freeze(model, stage.freeze, stage.freeze_last_layers)
    trained, frozen = _counts(model.parameters())
    in_layers = {id(p) for p in model.layers.parameters()}
    root = sum(p.numel() for p in model.parameters() if id(p) not in in_layers)
    half = stage.precision == "bfloat16"
    units = (_counts(layer.parameters()) for layer in model.layers)
    gathered, reduced = (4, 6) if half else (8, 8)
    unit = max(gathered * (t + f) + reduced * t for t, f in units)
    rows = -(-stage.method.tokens_per_pack // sequence)
    layer = max(_kept(config, number) for number in range(config.num_layers)) * rows
    layer *= 2 if half else 4
    kept = rows * config.hidden_size * 4 * config.num_layers
    if not stage.checkpoint_activations:
        kept, layer = 0, layer * config.num_layers
    return StageMemory(
        trained=trained,
        frozen=frozen,
        states=(16 if stage.optimizer.name == "muon" else 20) * trained + 4 * frozen,
        unit=unit,
        root=(2 if half else 4) * root,
        inputs=kept,
        layer=layer,
    )


def _counts(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Trained and frozen parameters."""
    trained = frozen = 0
    for parameter in parameters:
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()
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
