"""Loading of a checkpoint folder into a pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from neounify.checkpoint.load import Dtype, Memory, load_checkpoint
from neounify.checkpoint.lora_file import LoraSpec
from neounify.checkpoint.reader import CheckpointFolder
from neounify.errors import CheckpointError
from neounify.files import read_text
from neounify.model.build import compile_streams
from neounify.pipeline.pipeline import SYSTEM_MESSAGE_FILE, Pipeline
from neounify.tasks.processor import Processor
from neounify.text.template import default_system_message
from neounify.text.tokenizer import Tokenizer

MAX_SYSTEM_MESSAGE_BYTES = 2**20


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: Dtype = None,
    device: str | torch.device = "cpu",
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    memory: Memory = "all",
    verify: bool = False,
    compile: bool = False,
    colour_profiles: bool = True,
) -> Pipeline:
    """Load a checkpoint folder of the published layout and everything needed to use it.

    `dtype` is "float32", "bfloat16" or "float16", or "stored"; None or "auto" is the stored one
    too, but float32 on a CPU that is slow in half precision; `Pipeline.loaded_dtype` says which and
    why. Tensors stored in the dtype that is used are
    memory-mapped, not copied. `lora` merges one or several LoRAs, files of any form (docs/lora.md)
    or PEFT folders, with `lora_strength` each. `memory="stream"` keeps only the active
    stream resident, for models that fill the memory; `verify` checks all weights for NaN first.
    `compile` fuses elementwise work with torch.compile: slower at first, then faster at prefill and
    denoising. `colour_profiles=False` takes the pixels of all input images for sRGB, whatever
    profile they carry, as the published code does.

    Raises CheckpointError, ConfigError or TokenizerError for a folder that cannot be used.
    """
    path = Path(folder)
    # Before the weights: a folder without a tokenizer should say so at once.
    tokenizer = Tokenizer.from_folder(path)
    loaded = load_checkpoint(
        path,
        dtype=dtype,
        device=device,
        lora=lora,
        lora_strength=lora_strength,
        memory=memory,
        verify=verify,
    )
    if compile:
        compile_streams(loaded.model)
    return Pipeline(
        loaded.model,
        tokenizer,
        system_message=_system_message(path),
        residency=loaded.residency,
        fingerprint=loaded.checkpoint.fingerprint,
        loaded_dtype=loaded.dtype,
        colour_profiles=colour_profiles,
    )


def load_processor(checkpoint: CheckpointFolder, dtype: torch.dtype) -> Processor:
    """Processor of a checkpoint, without loading weights. Raises the errors of `load`."""
    tokenizer = Tokenizer.from_folder(checkpoint.path)
    message = _system_message(checkpoint.path)
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
