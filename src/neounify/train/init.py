"""Weights of a model that starts from nothing."""

from __future__ import annotations

import math

import torch
from torch import nn

from neounify.config import ModelConfig
from neounify.model.neo import NeoUnify

RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""What writes into the residual stream: scaled by 1/√(2 · layers), as in GPT-2."""


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
