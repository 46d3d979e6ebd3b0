"""Adapters on disk: written in PEFT's format or the published one, read again to be trained on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.lora_file import (
    LoraFile,
    LoraPair,
    LoraSpec,
    module_name,
    read_lora_file,
    read_loras,
)
from neounify.checkpoint.names import stream_of, to_published
from neounify.checkpoint.peft_config import PEFT_CONFIG, PEFT_WEIGHTS, PeftConfig
from neounify.checkpoint.reader import listed
from neounify.checkpoint.save import atomic_checkpoint, write_shard
from neounify.config.families import SENSENOVA_U1
from neounify.errors import CheckpointError, ConfigError
from neounify.files import atomic_file, check_absent, check_empty, is_empty, write_json
from neounify.lora.layers import (
    LoraConfig,
    LoraLinear,
    check_plain,
    linear_experts,
    lora_layers,
    trainable_only_lora,
)
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS

LoraForm: TypeAlias = Literal["peft", "published"]

SUFFIX = ".safetensors"


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
    family = model.config.family
    write_lora(pairs, shapes, folder, form, config=stored, base=base, overwrite=True, family=family)


def load_lora(model: NeoUnify, folder: str | os.PathLike[str]) -> LoraConfig:
    """Put the adapters of a PEFT folder on a plain model, trainable, all else frozen.

    The result fits them: `save_lora(model, result, …)` writes the same again. Its streams and
    modules are those that occur. Raises CheckpointError, with the model unchanged, for
    adapters that are damaged or of another model; ConfigError when the model has some already.
    """
    check_plain(model)
    family = model.config.family
    file = read_lora_file(Path(folder), expected_shapes(model.config), family)
    with linear_experts(model):
        modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        linear = sorted(modules.keys() & file.pairs.keys())
        config = _config(Path(folder), file, linear, family)
        for name, pair in file.pairs.items():
            layer = LoraLinear(modules[name], config)
            with torch.no_grad():
                layer.lora_A.copy_(pair.down)
                layer.lora_B.copy_(pair.up)
            model.set_submodule(name.removesuffix(".weight"), layer)
    trainable_only_lora(model)
    return config


def _config(folder: Path, file: LoraFile, linear: list[str], family: str) -> LoraConfig:
    """The config of adapters on the weights `linear`. Raises CheckpointError."""
    stored = file.config
    if stored is None:
        raise CheckpointError(
            f"{folder} has no config of PEFT: it is merged while loading, or converted first "
            "(neounify convert MODEL OUT --lora FILE --lora-form peft)"
        )
    others = [f"{to_published(n, family)} is not linear" for n in file.pairs if n not in linear]
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


def write_lora(
    pairs: Mapping[str, LoraPair],
    shapes: Mapping[str, torch.Size],
    target: str | os.PathLike[str],
    form: LoraForm,
    *,
    config: PeftConfig | None = None,
    base: str = "",
    overwrite: bool = False,
    family: str = SENSENOVA_U1,
) -> Path:
    """Write pairs (by our weight names), all or nothing; the file or folder that was written.

    "peft" makes a folder, `config` its config (None: the one that fits the pairs) and `base` the
    name of the checkpoint in it. "published" makes one file. Kernels get their shape back from
    `shapes`; modules are named as in `family`. An adapter that is there is replaced with
    `overwrite`. Raises CheckpointError.
    """
    if not pairs:
        raise CheckpointError("there are no adapters to save")
    path = Path(target).resolve()
    if form == "published":
        return _write_published(pairs, shapes, path, overwrite, family)
    _check_folder(path, overwrite)
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        down, up = _shaped(pair, shapes[name])
        module = module_name(name, family)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    document = (config or fitting_config(pairs, family)).document(
        [module_name(name, family) for name in pairs], base or None
    )
    with atomic_checkpoint(path) as aside:
        write_shard(aside / PEFT_WEIGHTS, tensors)
        write_json(aside / PEFT_CONFIG, document)
    return path


def convert_lora(
    lora: LoraSpec | Sequence[LoraSpec],
    shapes: Mapping[str, torch.Size],
    target: str | os.PathLike[str],
    form: LoraForm,
    *,
    base: str = "",
    overwrite: bool = False,
    family: str = SENSENOVA_U1,
) -> Path:
    """Write LoRAs of any form anew, as one; several become one of their ranks together.

    `shapes`, by our names, and `family` are those of the model they are for. The rest is as in
    `write_lora`. Raises CheckpointError, as reading and writing do.
    """
    updates = read_loras(lora, 1.0, shapes, family)
    pairs = {name: _joined(several) for name, several in updates.items()}
    return write_lora(pairs, shapes, target, form, base=base, overwrite=overwrite, family=family)


def fitting_config(pairs: Mapping[str, LoraPair], family: str) -> PeftConfig:
    """The config of pairs: the commonest rank and alpha, and patterns for modules that differ."""
    named = {module_name(name, family): pair for name, pair in pairs.items()}
    ranks = {name: pair.rank for name, pair in named.items()}
    alphas = {name: pair.scale * pair.rank for name, pair in named.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return PeftConfig(
        rank,
        alpha,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
    )


def _write_published(
    pairs: Mapping[str, LoraPair],
    shapes: Mapping[str, torch.Size],
    path: Path,
    overwrite: bool,
    family: str,
) -> Path:
    if path.is_dir() or path.suffix.lower() != SUFFIX:
        raise CheckpointError(f"{path}: a LoRA of the published form is one file, NAME{SUFFIX}")
    if not overwrite:
        check_absent(path, CheckpointError, "choose another name, or overwrite it")
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        module = module_name(name, family)
        down, up = _shaped(pair, shapes[name])
        tensors[f"{module}.lora_down.weight"] = down
        tensors[f"{module}.lora_up.weight"] = up
        tensors[f"{module}.alpha"] = torch.tensor(pair.scale * pair.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as aside:
            write_shard(aside, tensors)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be saved: {error}") from error
    return path


def _joined(updates: Sequence[LoraPair]) -> LoraPair:
    """Updates of one weight as one pair, of their ranks together where they are several."""
    if len(updates) == 1:
        return updates[0]
    ups = [update.scale * update.up.float() for update in updates]
    return LoraPair(torch.cat([u.down.float() for u in updates]), torch.cat(ups, dim=1), 1.0)


def _shaped(pair: LoraPair, weight: torch.Size) -> tuple[Tensor, Tensor]:
    """down and up as matrices, of a kernel as kernels."""
    ones = [1] * len(weight[2:])
    down = pair.down.reshape(pair.rank, *weight[1:])
    return down.contiguous(), pair.up.reshape(weight[0], pair.rank, *ones).contiguous()


def _check_folder(folder: Path, overwrite: bool) -> None:
    check_empty(folder, "an adapter", CheckpointError, overwrite=True)
    if not folder.exists() or is_empty(folder):
        return
    if not (folder / PEFT_CONFIG).is_file():
        raise CheckpointError(f"{folder} is not empty and holds no adapter; choose another folder")
    if not overwrite:
        raise CheckpointError(f"{folder} holds an adapter already; choose another, or overwrite it")
