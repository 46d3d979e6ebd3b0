"""Adapters on disk as PEFT keeps them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.lora_file import PEFT, LoraFile, read_lora_file
from neounify.checkpoint.names import stream_of, to_published
from neounify.checkpoint.peft_config import PEFT_CONFIG, PEFT_WEIGHTS, PeftConfig
from neounify.checkpoint.reader import listed
from neounify.checkpoint.save import _write_json, _write_shard, _written_aside
from neounify.errors import CheckpointError, ConfigError
from neounify.lora.config import STREAMS, LoraConfig
from neounify.lora.layers import LoraLinear, lora_layers, trainable_only_lora
from neounify.model.neo import NeoUnify


def save_lora(
    model: NeoUnify, config: LoraConfig, folder: str | os.PathLike[str], base: str = ""
) -> None:
    """Write a model's adapters, all or nothing; `base` names the checkpoint they are for.

    `neounify.load(..., lora=folder)` and `load_lora` read them, and so does PEFT on the
    published code. An adapter that is there already is replaced. Raises CheckpointError, and
    ConfigError when `config` is not that of the adapters.
    """
    tensors = {}
    for name, layer in lora_layers(model).items():
        if (layer.rank, layer.scale) != (config.rank, config.scale):
            raise ConfigError(
                f"lora: {name} has rank {layer.rank} and scale {layer.scale:g}, the config says "
                f"{config.rank} and {config.scale:g}"
            )
        target = _published_module(name)
        tensors[f"{PEFT.prefix}{target}.{PEFT.down}"] = layer.lora_A.detach()
        tensors[f"{PEFT.prefix}{target}.{PEFT.up}"] = layer.lora_B.detach()
    if not tensors:
        raise CheckpointError("the model has no adapters to save")
    target_folder = Path(folder).resolve()
    _check_replaceable(target_folder)
    stored = PeftConfig(config.rank, config.alpha, config.dropout, config.rslora)
    document = stored.document(list(map(_published_module, lora_layers(model))), base or None)
    with _written_aside(target_folder) as aside:
        _write_shard(aside / PEFT_WEIGHTS, tensors, list(tensors))
        _write_json(aside / PEFT_CONFIG, document)


def load_lora(model: NeoUnify, folder: str | os.PathLike[str]) -> LoraConfig:
    """Put the adapters of a PEFT folder on a plain model, trainable, all else frozen.

    The result fits them: `save_lora(model, result, …)` writes the same again. Its streams and
    modules are those that occur. Raises CheckpointError, with the model unchanged, for
    adapters that are damaged or of another model; ConfigError when the model has some already.
    """
    if lora_layers(model):
        raise ConfigError("lora: the model has adapters already; merge_lora(model) comes first")
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = read_lora_file(Path(folder), expected_shapes(model.config))
    config = _config(Path(folder), found, sorted(modules.keys() & found.pairs.keys()))
    for name, pair in found.pairs.items():
        layer = LoraLinear(modules[name], config)
        with torch.no_grad():
            layer.lora_A.copy_(pair.down)
            layer.lora_B.copy_(pair.up)
        model.set_submodule(name.removesuffix(".weight"), layer)
    trainable_only_lora(model)
    return config


def _config(folder: Path, found: LoraFile, linear: list[str]) -> LoraConfig:
    """The config of adapters on the weights `linear`. Raises CheckpointError."""
    stored = found.config
    if stored is None:
        raise CheckpointError(
            f"{folder} is not a PEFT adapter; a LoRA of the published kind is merged while loading"
        )
    others = [f"{to_published(n)} is not linear" for n in found.pairs if n not in linear]
    problems = [*found.problems, *others]
    if problems:
        raise CheckpointError(
            f"the adapter {folder} does not fit the model; problems: {len(problems)}\n"
            + "\n".join(listed(problems))
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


def _published_module(name: str) -> str:
    return to_published(f"{name}.weight").removesuffix(".weight")


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; an adapter is saved as a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / PEFT_CONFIG).is_file():
        raise CheckpointError(f"{folder} is not empty and holds no adapter; choose another folder")
