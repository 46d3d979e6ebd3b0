"""Quantised layers of a model: put in place on the meta device, and filled with codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from neounify.checkpoint.config_json import quantised_entry, with_quantised
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import StoredWeight
from neounify.config import ModelConfig
from neounify.errors import CheckpointError, RequestError
from neounify.model.neo import NeoUnify
from neounify.quant.backends import choose_backend
from neounify.quant.formats import CODES, RELATIVE, PublishedFormat, WeightFormat
from neounify.quant.linear import QuantEmbedding, QuantLinear, QuantModule
from neounify.quant.presets import preset_formats
from neounify.quant.stored import description_tensor

MAPPED = (CODES, RELATIVE)
"""Tensors that are large enough to stay mapped and to leave with their stream."""


def quant_modules(model: nn.Module) -> dict[str, QuantModule]:
    """The quantised modules of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantModule)}


def describe(name: str, layer: QuantModule) -> Tensor:
    """The tensor that names the format of the layer `name` in a file.

    Raises CheckpointError for a format that checkpoint folders do not have, and for an adapter.
    """
    if not isinstance(layer.format, PublishedFormat):
        raise CheckpointError(
            f"{name} is quantised as {layer.format.name}, which is not a format of checkpoint "
            'folders; load it with backend="decoded" to save it'
        )
    if isinstance(layer, QuantLinear) and layer.down is not None:
        raise CheckpointError(
            f"{name} has an adapter beside its codes, which a checkpoint cannot hold; load the "
            'LoRA with backend="decoded" to merge it'
        )
    return description_tensor(layer.format)


def place_stored(
    model: NeoUnify,
    sources: dict[str, StoredWeight],
    checkpoint: CheckpointFolder,
    backend: str,
    device: torch.device,
) -> dict[str, Tensor]:
    """Quantised layers where `sources` (our name → stored weight) hold codes of linear layers.

    Their codes take the place of the weights in `sources`; the small tensors beside them come back,
    by our names. Weights of other modules and shares of ranks stay, to be decoded. LoRA updates of
    a quantised weight become an adapter beside it.
    """
    small: dict[str, Tensor] = {}
    for name, source in list(sources.items()):
        codes = source.codes
        if codes is None or source.share is not None or not _takes_codes(model, name):
            continue
        if source.info.stored_shape[0] != codes.shape[0]:
            continue  # blocks that cross the ends of rows
        _place(model, name, codes.format, source, backend, device)
        module = name.removesuffix(CODES)
        for part in codes.format.layout(codes.shape):
            if part in MAPPED:
                stored = source.name.removesuffix(CODES) + part
                kept = source.file.tensors[stored].dtype
                sources[module + part] = StoredWeight(source.file, stored, kept=kept)
            else:
                small[module + part] = codes.beside[part].to(device)
    return small


def place_new(
    model: NeoUnify,
    sources: dict[str, StoredWeight],
    preset: str,
    backend: str,
    device: torch.device,
) -> None:
    """Quantised layers as a preset says, of weights that are quantised whenever they are read.

    `sources` (our name → stored weight) get their formats. Weights that are stored as codes already
    keep theirs, LoRA updates become an adapter beside the codes. Raises RequestError where all are
    codes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    placed = 0
    for name, format in preset_formats(preset, shapes, model.config.num_layers).items():
        source = sources[name]
        if source.codes or source.share is not None or not _takes_codes(model, name):
            continue
        _place(model, name, format, source, backend, device)
        sources[name] = replace(source, updates=(), format=format)
        placed += 1
    if not placed:
        raise RequestError(
            f"every weight that quantise={preset!r} applies to is quantised already: load the "
            "checkpoint as it is, without a preset",
            param="quantise",
        )


def quantised_config(config: ModelConfig, preset: str, fingerprint: str) -> ModelConfig:
    """The config of a model that is quantised while it is loaded."""
    if not config.published:
        return config
    entry = quantised_entry(preset, fingerprint)
    return config.replace(published=with_quantised(config.published, entry))


def _takes_codes(model: NeoUnify, name: str) -> bool:
    """Whether a weight may stay codes: of linear layers, and of an embedding that is not tied."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return not model.config.tie_embeddings
    return type(module) is nn.Linear


def _place(
    model: NeoUnify,
    name: str,
    format: WeightFormat,
    source: StoredWeight,
    backend: str,
    device: torch.device,
) -> None:
    path = name.rpartition(".")[0]
    plain = model.get_submodule(path)
    rows, columns = plain.get_parameter("weight").shape
    if isinstance(plain, nn.Embedding):
        model.set_submodule(path, QuantEmbedding(format, (rows, columns)))
        return
    assert isinstance(plain, nn.Linear)
    chosen = choose_backend(backend, format, columns, device)
    layer = QuantLinear(format, (rows, columns), plain.bias, chosen)
    if source.updates:
        layer.add_adapters([(u.down, u.up, u.scale) for u in source.updates], device)
    model.set_submodule(path, layer)
