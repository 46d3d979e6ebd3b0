"""adapter_config.json, the half of a PEFT adapter that says what its matrices mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neounify.checkpoint.reader import read_json
from neounify.errors import CheckpointError

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_NUMBER = 1e30

BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base model's weights as they were."""
NOT_PLAIN = (
    *("fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
)
"""Fields that, when set, make an adapter more than B A on some weights."""
HARMLESS = ("use_rslora", "eva_config", "corda_config", "lora_ga_config", "loftq_config")
"""Fields that look like those of a variant (`_is_variant`) but change nothing here."""


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter's matrices share. Dropout matters to training only."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r: the factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @staticmethod
    def read(folder: Path) -> PeftConfig:
        """The config of an untrusted adapter folder.

        Raises CheckpointError when it is missing or damaged, and for variants of LoRA (DoRA,
        rank patterns, …): merging those as if they were plain would be wrong without a sign.
        """
        file = folder / PEFT_CONFIG
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; PEFT's adapters need it for their scale")
        document = read_json(file, MAX_CONFIG_BYTES)
        _refuse_variants(file, document)
        rank, alpha = _number(file, document, "r"), _number(file, document, "lora_alpha")
        dropout = _number(file, document, "lora_dropout", 0.0)
        rslora = document.get("use_rslora", False)
        if rank != int(rank) or rank < 1:
            raise _wrong(file, "r", rank, "a whole number from 1")
        if not 0 <= dropout < 1:
            raise _wrong(file, "lora_dropout", dropout, "from 0 to below 1")
        if not isinstance(rslora, bool):
            raise _wrong(file, "use_rslora", rslora, "true or false")
        return PeftConfig(int(rank), float(alpha), float(dropout), rslora)

    def document(self, targets: Sequence[str], base: str | None) -> dict[str, Any]:
        """The JSON object for adapters on `targets`, published module names in full."""
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": list(targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_dora": False,
            "inference_mode": True,
        }


def _number(file: Path, document: dict[str, Any], key: str, default: Any = None) -> float:
    value = document.get(key, default)
    # Compared, not converted: JSON's whole numbers may be too large for a float; NaN fails too.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -MAX_NUMBER < value < MAX_NUMBER:
        raise _wrong(file, key, value, "a number, not NaN or infinite")
    return value


def _wrong(file: Path, key: str, value: Any, wanted: str) -> CheckpointError:
    found = repr(value)[:40]
    return CheckpointError(
        f"{file} is not the config of a PEFT adapter: {key} is {found}, expected {wanted}"
    )


def _refuse_variants(file: Path, document: dict[str, Any]) -> None:
    used = [key for key, value in document.items() if value and _is_variant(key)]
    if document.get("peft_type") != "LORA":
        used.append(f"peft_type {document.get('peft_type')!r}")
    if document.get("bias", "none") != "none":
        used.append(f"bias {document['bias']!r}")
    if document.get("init_lora_weights") not in BASE_UNTOUCHED:
        used.append(f"init_lora_weights {document['init_lora_weights']!r}")
    if used:
        raise CheckpointError(f"{file}: only plain LoRA can be used, this has {', '.join(used)}")


def _is_variant(key: str) -> bool:
    # By the shape of the name too: a variant that is younger than this list must not slip by.
    named = key.startswith("use_") or key.endswith(("_config", "rank_pattern", "alpha_pattern"))
    return key in NOT_PLAIN or (named and key not in HARMLESS)
