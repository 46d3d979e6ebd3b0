"""Small models with adapters that do something."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from neounify.checkpoint import to_published
from neounify.config import ModelConfig
from neounify.lora import LoraConfig, add_lora, lora_layers
from neounify.model import NeoUnify
from support.checkpoint_folders import CONFIGS, write_checkpoint
from support.models import Maker, pack, random_model

LINEAR = ("attention", "mlp", "timestep", "noise scale", "image head", "lm head")
MODULES = {
    "dense": LINEAR,
    "sparse": (*LINEAR, "experts", "router"),
    "pixel": tuple(kind for kind in LINEAR if kind != "image head"),
    "bias": LINEAR,
}
"""All kinds of linear layers that a model of `CONFIGS` has."""


def everywhere(kind: str = "dense", **fields: object) -> LoraConfig:
    """Adapters of rank 3 on every linear layer of a model of `CONFIGS`."""
    values: dict[str, object] = {"rank": 3, "alpha": 5.0, "modules": MODULES[kind]} | fields
    return LoraConfig(**values)  # type: ignore[arg-type]


def fill(model: NeoUnify, seed: int = 1) -> None:
    """Random values in every B."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) / 10)


def adapted(kind: str = "dense", config: LoraConfig | None = None) -> NeoUnify:
    """A model of `CONFIGS` with filled adapters, those of `everywhere` unless given."""
    model = random_model(CONFIGS[kind], 0)
    add_lora(model, config or everywhere(kind))
    fill(model)
    return model


def outputs(model: NeoUnify) -> tuple[Tensor, Tensor]:
    """Logits and clean images for documents that hold every case between them."""
    maker = Maker(random.Random(0), model.config)
    logits, clean = pack(maker.showcase(), model.config, torch.float32).run(model)
    assert clean is not None
    return logits, clean


def write_base(folder: Path, config: ModelConfig) -> Path:
    """The checkpoint of the model that `adapted` starts from."""
    state = random_model(config, 0).state_dict()
    return write_checkpoint(folder, config, {to_published(n): t for n, t in state.items()})
