"""Model of a stage: fresh weights, frozen parts, adapters, activation checkpointing."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neounify.checkpoint.names import part_of, stream_of
from neounify.config import ModelConfig
from neounify.errors import ConfigError
from neounify.model.neo import NeoUnify
from neounify.model.stream import Layer

RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""Weights that write into the residual stream: scaled by 1/√(2 · layers), as in GPT-2."""


def new_model(config: ModelConfig, seed: int) -> NeoUnify:
    """A model with fresh weights, the same for the same seed; float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NeoUnify(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                _fill(name, parameter, config)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    return model


def _fill(name: str, parameter: nn.Parameter, config: ModelConfig) -> None:
    fan_in = parameter[0].numel()
    std = 1 / math.sqrt(fan_in)
    if name.endswith(RESIDUAL):
        std /= math.sqrt(2 * config.num_layers)
    elif name == "embed_tokens.weight":
        std = 0.5
    elif name == "lm_head.weight":
        std /= 2
    nn.init.normal_(parameter, std=std)


def checkpoint_layers(model: NeoUnify, enabled: bool) -> None:
    """Let every layer store its input only and recompute the rest in the backward pass.

    A third more computation; memory holds one layer's activations instead of all layers'
    (Chen et al. 2016). `enabled` False restores the plain layers.
    """
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.__dict__.pop("forward", None)
        if enabled:
            layer.forward = partial(_checkpointed, layer.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False)


def freeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Train every parameter but those of the named streams and parts. Raises ConfigError."""
    known: set[str] = set()
    for name, parameter in model.named_parameters():
        labels = {stream_of(name), part_of(name)}
        known |= labels
        parameter.requires_grad_(not labels & set(names))
    unknown = set(names) - known
    if unknown:
        raise ConfigError(f"freeze: {sorted(unknown)} unknown; known are {sorted(known)}")
