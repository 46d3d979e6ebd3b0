"""Quantised layers of a model: put in place on the meta device, and filled with codes."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from neounify.checkpoint.config_json import quantised_entry, with_quantised
from neounify.checkpoint.load import stored_weights
from neounify.checkpoint.names import to_published
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import Share, StoredWeight, part_shares
from neounify.config import ModelConfig
from neounify.errors import CheckpointError, ConfigError, RequestError
from neounify.model.build import meta_model
from neounify.model.neo import NeoUnify
from neounify.quant.backends import AUTO, check_held, choose_backend
from neounify.quant.blocks import BlockRows
from neounify.quant.formats import (
    CODES,
    RELATIVE,
    FourBits,
    PublishedFormat,
    Shape,
    WeightFormat,
)
from neounify.quant.linear import QuantEmbedding, QuantLinear, QuantModule
from neounify.quant.presets import preset_formats
from neounify.quant.stored import StoredCodes, description_tensor
from neounify.quant.w4 import GROUP

log = logging.getLogger("neounify")

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
            'LoRA with backend="decoded" to merge it into plain weights, or merge it into codes '
            "with `neounify convert MODEL OUT --lora FILE --to stored`"
        )
    return description_tensor(layer.format)


def place_codes(
    model: NeoUnify,
    sources: dict[str, StoredWeight],
    checkpoint: CheckpointFolder,
    device: torch.device,
    quantise: str | None,
    backend: str,
) -> dict[str, Tensor]:
    """Put quantised layers in place; the tensors that `sources` do not hold, by our names.

    Raises the errors of `place_stored` and, with a preset, of `place_new`.
    """
    if quantise:
        place_new(model, sources, quantise, backend, device)
        model.config = quantised_config(model.config, quantise, checkpoint.fingerprint())
    return place_stored(model, sources, checkpoint, backend, device)


def place_stored(
    model: NeoUnify,
    sources: dict[str, StoredWeight],
    checkpoint: CheckpointFolder,
    backend: str,
    device: torch.device,
) -> dict[str, Tensor]:
    """Quantised layers where `sources` (our name → stored weight) hold codes of linear layers.

    Their codes take the place of the weights in `sources`; the small tensors beside them come back,
    by our names. Weights of other modules stay, to be decoded. LoRA updates of a quantised weight
    become an adapter beside it; an embedding, which has none, is decoded and updated. Shares that
    codes cannot be cut into are decoded with a warning, or raise ConfigError for a backend that is
    named.
    """
    small: dict[str, Tensor] = {}
    uncut: list[ConfigError] = []
    for name, source in list(sources.items()):
        codes = _kept_codes(model, name, source)
        if codes is None:
            continue
        try:
            check_cut(name, codes.format, codes.shape, source.share)
        except ConfigError as error:
            if backend != AUTO:
                raise
            uncut.append(error)
            continue
        _place(model, name, codes.format, source, backend, device)
        module = name.removesuffix(CODES)
        shares = part_shares(codes.format, codes.shape, source.share)
        for part, share in shares.items():
            if part in MAPPED:
                stored = source.name.removesuffix(CODES) + part
                kept = source.file.tensors[stored].dtype
                sources[module + part] = StoredWeight(source.file, stored, share=share, kept=kept)
            else:
                beside = codes.beside[part]
                small[module + part] = (beside if share is None else share.of(beside)).to(device)
    if uncut:
        log.warning("%d quantised weights are decoded, such as %s", len(uncut), uncut[0])
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
    keep theirs, LoRA updates become an adapter beside the codes, or are quantised with an
    embedding. Raises RequestError where all are
    codes, and ConfigError for shares that a format cannot be cut into.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layers, tied = model.config.num_layers, model.config.tie_embeddings
    placed = 0
    for name, format in preset_formats(preset, shapes, layers, tied=tied).items():
        source = sources[name]
        if source.codes or not _takes_codes(model, name):
            continue
        check_cut(name, format, shapes[name], source.share)
        _place(model, name, format, source, backend, device)
        layer = model.get_submodule(name.rpartition(".")[0])
        beside = isinstance(layer, QuantLinear)
        sources[name] = replace(source, updates=() if beside else source.updates, format=format)
        placed += 1
    if not placed:
        raise RequestError(
            f"every weight that quantise={preset!r} applies to is quantised already: load the "
            "checkpoint as it is, without a preset",
            param="quantise",
        )


def check_cut(name: str, format: WeightFormat, shape: Shape, share: Share | None) -> None:
    """Raise ConfigError where the columns of a share begin or end inside a group of a format.

    A group has one scale, or is rotated together.
    """
    if share is None or share.dim == 0:
        return
    unit = format.group
    if isinstance(format, FourBits):
        unit = max(unit, GROUP)
    elif isinstance(format, BlockRows):
        unit = format.blocks.elements
    ends = (share.places.start, share.places.stop)
    if any(end % unit for end in ends):
        raise ConfigError(
            f"{name}: a device would have columns {ends[0]} to {ends[1]} of {shape[1]}, but "
            f"{format.name} keeps groups of {unit} together: use fewer devices or plain weights"
        )


def quantised_config(config: ModelConfig, preset: str, fingerprint: str) -> ModelConfig:
    """The config of a model that is quantised while it is loaded."""
    if not config.published:
        return config
    entry = quantised_entry(preset, fingerprint)
    return config.replace(published=with_quantised(config.published, entry))


def kept_formats(checkpoint: CheckpointFolder) -> dict[str, WeightFormat]:
    """Published name → format of the weights that stay codes in the model of a checkpoint.

    Its other quantised weights are decoded when they are read.
    """
    model, family = meta_model(checkpoint.config), checkpoint.config.family
    names = {name: to_published(name, family) for name in model.state_dict()}
    quantised = [name for name, published in names.items() if published in checkpoint.quantised]
    sources = stored_weights(checkpoint, quantised)
    kept = {names[name]: _kept_codes(model, name, source) for name, source in sources.items()}
    return {published: codes.format for published, codes in kept.items() if codes is not None}


def _kept_codes(model: NeoUnify, name: str, source: StoredWeight) -> StoredCodes | None:
    """The codes of a stored weight, where they are not decoded when it is read."""
    codes = source.codes
    if codes is None or not _takes_codes(model, name):
        return None
    if source.info.stored_shape[0] != codes.shape[0]:
        return None  # blocks that cross the ends of rows
    embeds = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    return None if embeds and source.updates else codes


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
    check_held(format, device)
    shape = list(plain.get_parameter("weight").shape)
    share = source.share
    if share is not None:
        shape[share.dim] = len(share.places)
    if isinstance(plain, nn.Embedding):
        model.set_submodule(path, QuantEmbedding(format, tuple(shape)))
        return
    assert isinstance(plain, nn.Linear)
    chosen = choose_backend(backend, format, tuple(shape), device)
    layer = QuantLinear(format, tuple(shape), plain.bias, chosen)
    pairs = [(u.down, u.up, u.scale) for u in source.updates]
    if share is not None and share.dim == 0:
        pairs = [(down, share.of(up), scale) for down, up, scale in pairs]
    elif share is not None:
        pairs = [(share.of(down), up, scale) for down, up, scale in pairs]
    if pairs:
        layer.add_adapters(pairs, device)
    model.set_submodule(path, layer)
