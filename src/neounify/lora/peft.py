"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.lora_file import LoraFile, LoraPair, read_lora_file
from neounify.checkpoint.lora_save import LoraForm, write_lora
from neounify.checkpoint.names import stream_of, to_published
from neounify.checkpoint.peft_config import PeftConfig
from neounify.checkpoint.reader import listed
from neounify.errors import CheckpointError, ConfigError
from neounify.lora.config import LoraConfig
from neounify.lora.layers import LoraLinear, lora_layers, trainable_only_lora
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS


def save_lora(
    model: NeoUnify,
    config: LoraConfig,
    folder: str | os.PathLike[str],
    base: str = "",
    *,
    form: LoraForm = "peft",
) -> None:
    """Write a model's adapters, all or nothing; `base` names the checkpoint they are for.

    `neounify.load(..., lora=folder)` and `load_lora` read them, and so does PEFT on the
    published code. With `form="published"`, `folder` is the one file to write, which is merged
    while loading. An adapter that is there already is replaced. Raises CheckpointError, and
    ConfigError when `config` is not that of the adapters.
    """
    pairs = {}
    for name, layer in lora_layers(model).items():
        if (layer.rank, layer.scale) != (config.rank, config.scale):
            raise ConfigError(
                f"lora: {name} has rank {layer.rank} and scale {layer.scale:g}, the config says "
                f"{config.rank} and {config.scale:g}"
            )
        pairs[f"{name}.weight"] = LoraPair(
            layer.lora_A.detach(), layer.lora_B.detach(), layer.scale
        )
    stored = PeftConfig(config.rank, config.alpha, config.dropout, config.rslora)
    shapes = expected_shapes(model.config)
    write_lora(pairs, shapes, folder, form, config=stored, base=base, overwrite=True)


def load_lora(model: NeoUnify, folder: str | os.PathLike[str]) -> LoraConfig:
    """Put the adapters of a PEFT folder on a plain model, trainable, all else frozen.

    The result fits them: `save_lora(model, result, …)` writes the same again. Its streams and
    modules are those that occur. Raises CheckpointError, with the model unchanged, for
    adapters that are damaged or of another model; ConfigError when the model has some already.
    """
    if lora_layers(model):
        raise ConfigError("lora: the model has adapters already; merge_lora(model) comes first")
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    file = read_lora_file(Path(folder), expected_shapes(model.config))
    config = _config(Path(folder), file, sorted(modules.keys() & file.pairs.keys()))
    for name, pair in file.pairs.items():
        layer = LoraLinear(modules[name], config)
        with torch.no_grad():
            layer.lora_A.copy_(pair.down)
            layer.lora_B.copy_(pair.up)
        model.set_submodule(name.removesuffix(".weight"), layer)
    trainable_only_lora(model)
    return config


def _config(folder: Path, file: LoraFile, linear: list[str]) -> LoraConfig:
    """The config of adapters on the weights `linear`. Raises CheckpointError."""
    stored = file.config
    if stored is None:
        raise CheckpointError(
            f"{folder} has no config of PEFT: it is merged while loading, or converted first "
            "(neounify convert MODEL OUT --lora FILE --lora-form peft)"
        )
    others = [f"{to_published(n)} is not linear" for n in file.pairs if n not in linear]
    problems = [*file.problems, *others]
    if problems:
        raise CheckpointError(
            f"the adapter {folder} does not fit the model; problems: {len(problems)}\n"
            + "\n".join(listed(problems))
        )
    if not stored.uniform:
        raise CheckpointError(
            f"{folder} cannot be trained on: its modules differ in rank or alpha; it can be merged"
        )
    streams = {stream_of(name) for name in linear}
    try:
        return LoraConfig(
            rank=stored.rank,
            alpha=stored.alpha,
            dropout=stored.dropout,
            rslora=stored.rslora,
            streams=tuple(s for s in STREAMS if s in streams),
            modules=tuple(sorted({name.split(".")[-2] for name in linear})),
        )
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be trained on: {error}") from error
