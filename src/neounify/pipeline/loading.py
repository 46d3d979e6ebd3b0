"""Public API: `load`, from a checkpoint to a `Pipeline`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from neounify.attention import check_backend
from neounify.checkpoint.load import Dtype, Memory, PlanUse, load_checkpoint
from neounify.checkpoint.lora_file import LoraSpec
from neounify.checkpoint.reader import CheckpointFolder, checkpoint_home
from neounify.errors import CheckpointError
from neounify.files import read_text
from neounify.model.build import compile_streams
from neounify.pipeline.pipeline import SYSTEM_MESSAGE_FILE, Pipeline
from neounify.tasks.program import Processor
from neounify.text.template import default_system_message
from neounify.text.tokenizer import Tokenizer

MAX_SYSTEM_MESSAGE_BYTES = 2**20


def load(
    folder: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    dtype: Dtype = None,
    device: str | torch.device = "cpu",
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    memory: Memory = "auto",
    resident_layers: int | None = None,
    plan: PlanUse = "check",
    verify: bool = False,
    compile: bool = False,
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
    `compile` makes prefill and denoising faster, after a slow start. `attention` names the
    backend of attention, `backend` that of layers of codes; `quantise` is a preset such as "int8"
    (docs/compression.md). `colour_profiles=False` takes the pixels of all input images for sRGB.

    Raises CheckpointError, ConfigError, TokenizerError or MemoryPlanError.
    """
    check_backend(attention)
    # Before the weights: a folder without a tokenizer should say so at once.
    home = checkpoint_home(folder, config)
    tokenizer = Tokenizer.from_folder(home)
    loaded = load_checkpoint(
        folder,
        config=home,
        dtype=dtype,
        device=device,
        lora=lora,
        lora_strength=lora_strength,
        memory=memory,
        resident_layers=resident_layers,
        plan=plan,
        verify=verify,
        quantise=quantise,
        backend=backend,
    )
    if compile:
        compile_streams(loaded.model)
    return Pipeline(
        loaded.model,
        tokenizer,
        system_message=_system_message(home),
        residency=loaded.residency,
        fingerprint=loaded.checkpoint.fingerprint,
        loaded_dtype=loaded.dtype,
        attention=attention,
        colour_profiles=colour_profiles,
    )


def load_processor(checkpoint: CheckpointFolder, dtype: torch.dtype) -> Processor:
    """Processor of a checkpoint, without loading weights. Raises the errors of `load`."""
    tokenizer = Tokenizer.from_folder(checkpoint.home)
    message = _system_message(checkpoint.home)
    return Processor(
        checkpoint.config,
        tokenizer,
        default_system_message() if message is None else message,
        dtype,
    )


def _system_message(folder: Path) -> str | None:
    file = folder / SYSTEM_MESSAGE_FILE
    if not file.is_file():
        return None
    return read_text(file, MAX_SYSTEM_MESSAGE_BYTES, CheckpointError)
