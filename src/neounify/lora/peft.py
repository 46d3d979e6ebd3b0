"""Adapters on disk as PEFT keeps them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from neounify.checkpoint.lora import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from neounify.checkpoint.names import to_published
from neounify.errors import CheckpointError
from neounify.lora.layers import LoraConfig, LoraLinear
from neounify.model.neo import NeoUnify


def save_lora(model: NeoUnify, config: LoraConfig, folder: Path, base: str = "") -> None:
    """Write a model's adapters; `base` names the checkpoint they are for. Raises CheckpointError.

    `neounify.load(..., lora=folder)` reads them, and so does PEFT on the published code.
    """
    tensors = {}
    targets = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            published = to_published(f"{name}.weight").removesuffix(".weight")
            targets.append(published)
            for half in ("lora_A", "lora_B"):
                value = getattr(module, half).detach().contiguous()
                tensors[f"{PEFT_PREFIX}{published}.{half}.weight"] = value
    if not tensors:
        raise CheckpointError("the model has no adapters to save")
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.saving")
    try:
        aside.mkdir(parents=True)
        save_file(tensors, aside / PEFT_WEIGHTS, metadata={"format": "pt"})
        document = json.dumps(_document(config, targets, base), indent=2)
        (aside / PEFT_CONFIG).write_text(document + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapter {folder} could not be saved: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _document(config: LoraConfig, targets: list[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
