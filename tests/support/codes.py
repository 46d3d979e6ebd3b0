"""Models of codes without values."""

from __future__ import annotations

import torch
from torch import nn

from neounify.model import NeoUnify
from neounify.quant.backends import choose_backend
from neounify.quant.linear import QuantEmbedding, QuantLinear
from neounify.quant.presets import preset_formats


def with_codes(
    model: NeoUnify, preset: str, device: torch.device, backend: str = "auto"
) -> NeoUnify:
    """A model on the meta device, its layers as `load` puts them in place for a device."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layers, tied = model.config.num_layers, model.config.tie_embeddings
    for name, format in preset_formats(preset, shapes, layers, tied=tied).items():
        path, shape = name.rpartition(".")[0], shapes[name]
        plain = model.get_submodule(path)
        if isinstance(plain, nn.Embedding):
            model.set_submodule(path, QuantEmbedding(format, shape))
        else:
            assert isinstance(plain, nn.Linear)
            chosen = choose_backend(backend, format, shape, device)
            model.set_submodule(path, QuantLinear(format, shape, plain.bias, chosen))
    return model
