"""Loading of a model and everything needed to use it, on one device or on several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from neounify.attention import check_backend, select
from neounify.checkpoint.dtypes import Dtype
from neounify.checkpoint.load import (
    Memory,
    PlanUse,
    expected_shapes,
    load_checkpoint,
    resolve_device,
)
from neounify.checkpoint.lora_file import LoraSpec
from neounify.checkpoint.reader import CheckpointFolder, checkpoint_home
from neounify.checkpoint.residency import NullResidency
from neounify.config import ModelConfig
from neounify.distributed.group import ALONE, Group
from neounify.errors import CheckpointError, ConfigError
from neounify.files import read_text
from neounify.model.build import check_compile, compile_streams, compiles_by_default
from neounify.pipeline.pipeline import SYSTEM_MESSAGE_FILE, Pipeline
from neounify.tasks.program import Processor
from neounify.text.forms import TEMPLATES
from neounify.text.tokenizer import Tokenizer

MAX_SYSTEM_MESSAGE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What to load and how, see `load`: the same on all ranks."""

    folder: Path
    config: str | os.PathLike[str] | None = None
    dtype: Dtype = None
    lora: LoraSpec | Sequence[LoraSpec] | None = None
    lora_strength: float = 1.0
    memory: Memory = "auto"
    resident_layers: int | None = None
    plan: PlanUse = "check"
    verify: bool = False
    compile: bool | None = None
    attention: str = "auto"
    colour_profiles: bool = True
    quantise: str | None = None
    backend: str = "auto"


def load(
    folder: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    dtype: Dtype = None,
    device: str | torch.device = "cpu",
    devices: Sequence[str] = (),
    sequence_parallel: int = 1,
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    memory: Memory = "auto",
    resident_layers: int | None = None,
    plan: PlanUse = "check",
    verify: bool = False,
    compile: bool | None = None,
    attention: str = "auto",
    colour_profiles: bool = True,
    quantise: str | None = None,
    backend: str = "auto",
) -> Pipeline:
    """Load a checkpoint folder of the published layout and everything needed to use it.

    `folder` may also be one .safetensors or .gguf file; `config` then names the folder with its
    config.json and tokenizer, by default the one the file is in. `dtype` is "float32", "bfloat16",
    "float16" or "stored"; None or "auto" is the stored one too, but float32 on a CPU that is slow
    in half precision; `Pipeline.loaded_dtype` says which and why. Tensors stored in the dtype that
    is used are memory-mapped. `lora` merges LoRAs (docs/lora.md), with `lora_strength` each.
    `memory`, `resident_layers`, `plan`: docs/memory.md. `verify` checks all weights for NaN first.
    `compile` makes prefill and denoising faster, after a slow start; None compiles large models on
    a GPU (`neounify.model.build.compiles_by_default`). `attention` names the backend of attention,
    `backend` that of layers of codes; `quantise` is a preset such as "int8" (docs/compression.md).
    `colour_profiles=False` takes the pixels of all input images for sRGB.

    `devices`, such as ["cuda:0", "cuda:1"], in place of `device`: the model is spread over them,
    one process each, of which this one is the first (docs/scale.md). Understanding shares the
    heads, generation the guidance branches, or the rows of an image between `sequence_parallel`
    of the devices.

    Raises CheckpointError, ConfigError, RequestError, TokenizerError or MemoryPlanError.
    """
    options = LoadOptions(
        folder=Path(folder),
        config=config,
        dtype=dtype,
        lora=lora,
        lora_strength=lora_strength,
        memory=memory,
        resident_layers=resident_layers,
        plan=plan,
        verify=verify,
        compile=compile,
        attention=attention,
        colour_profiles=colour_profiles,
        quantise=quantise,
        backend=backend,
    )
    if not devices and sequence_parallel == 1:
        return load_rank(options, ALONE, device)
    return load_on_devices(options, devices or (str(device),), sequence_parallel)


def load_on_devices(options: LoadOptions, devices: Sequence[str], sequence: int) -> Pipeline:
    """A pipeline whose model is spread over several devices. Raises the errors of `load`."""
    from neounify.distributed.tensor import check_degree
    from neounify.engine.spread import check_sequence
    from neounify.pipeline.devices import DeviceGroup, check_names

    check_names(devices)
    check_sequence(len(devices), sequence)
    if len(devices) == 1:
        return load_rank(options, ALONE, devices[0])
    single = {
        "compile": bool(options.compile),
        f"memory={options.memory!r}": options.memory not in ("auto", "all"),
    }
    if refused := [name for name, asked in single.items() if asked]:
        raise ConfigError(f"{' and '.join(refused)}: for one device, got {len(devices)} devices")
    check_degree(CheckpointFolder.open(options.folder, options.config).config, len(devices))
    # The plan of one device counts all weights.
    options = replace(options, memory="all", plan="ignore")
    spread = DeviceGroup(devices, sequence, options)
    group = spread.group
    try:
        pipe = spread.start(lambda: load_rank(options, group, devices[0]))
    except BaseException:
        spread.close()
        raise
    assert pipe is not None
    pipe.devices = spread
    return pipe


def load_rank(
    options: LoadOptions, group: Group, device: str | torch.device, *, cut: bool = True
) -> Pipeline:
    """The pipeline of one rank of a group. With `cut` it has a share of the understanding stream.

    Raises the errors of `load`.
    """
    check_backend(options.attention)
    home = checkpoint_home(options.folder, options.config)
    # Before the weights: a folder without a tokenizer should say so at once.
    tokenizer = Tokenizer.from_folder(home, ())
    place = resolve_device(device)

    def check_attention(config: ModelConfig, dtype: torch.dtype) -> None:
        select(place, dtype, config.head_dim, options.attention)

    if options.compile:
        check_compile(place)
    parts = None
    if cut and group.size > 1:
        from neounify.distributed.tensor import join, shares

        shared = CheckpointFolder.open(options.folder, home).config
        parts = shares(shared, expected_shapes(shared), group)
    loaded = load_checkpoint(
        options.folder,
        config=home,
        dtype=options.dtype,
        device=place,
        lora=options.lora,
        lora_strength=options.lora_strength,
        memory=options.memory,
        resident_layers=options.resident_layers,
        plan=options.plan,
        verify=options.verify,
        quantise=options.quantise,
        backend=options.backend,
        attention=options.attention,
        shares=parts,
        before=check_attention,
    )
    tokenizer.require(TEMPLATES[loaded.model.config.template].tokens)
    if parts is not None:
        join(loaded.model, group)
    wanted = options.compile
    if wanted is None:
        resident = parts is None and isinstance(loaded.residency, NullResidency)
        wanted = compiles_by_default(loaded.model, resident=resident)
    if wanted:
        compile_streams(loaded.model)
    return Pipeline(
        loaded.model,
        tokenizer,
        system_message=_system_message(home),
        residency=loaded.residency,
        fingerprint=loaded.checkpoint.fingerprint,
        loaded_dtype=loaded.dtype,
        attention=options.attention,
        colour_profiles=options.colour_profiles,
        kept=loaded.kept,
    )


def load_tokenizer(home: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a folder, with all tokens that the model's prompts need.

    Raises TokenizerError.
    """
    return Tokenizer.from_folder(home, TEMPLATES[config.template].tokens)


def load_processor(checkpoint: CheckpointFolder, dtype: torch.dtype) -> Processor:
    """Processor of a checkpoint, without loading weights. Raises the errors of `load`."""
    tokenizer = load_tokenizer(checkpoint.home, checkpoint.config)
    return Processor(checkpoint.config, tokenizer, _system_message(checkpoint.home), dtype)


def _system_message(folder: Path) -> str | None:
    file = folder / SYSTEM_MESSAGE_FILE
    if not file.is_file():
        return None
    return read_text(file, MAX_SYSTEM_MESSAGE_BYTES, CheckpointError)
