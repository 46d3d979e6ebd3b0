"""adapter_config.json of a PEFT adapter: rank, alpha and target modules of its matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from neounify.checkpoint.reader import read_document
from neounify.errors import CheckpointError

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_NUMBER = 1e30
MAX_PATTERN_CHARS = 1000
MAX_PATTERN_REPEATS = 2
MAX_EXPRESSIONS = 100
"""Bounds of regular expressions in a config, which is untrusted: matching them must end soon."""

BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base model's weights as they were."""
NOT_PLAIN = (
    *("fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
)
"""Fields that, when set, make an adapter more than B A on some weights."""
HARMLESS = ("use_rslora", "eva_config", "corda_config", "lora_ga_config", "loftq_config")
"""Fields that look like those of a variant (`_is_variant`) but change nothing here."""


class Patterns:
    """Values for modules by name, as PEFT matches them: the first pattern wins.

    A pattern is a regular expression for the end of a module's name, from a dot on. Most are plain
    names; those are looked up. Raises ValueError for expressions that might take for ever.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = dict(values)
        self._index_of: dict[str, int] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for index, pattern in enumerate(self.values):
            if re.fullmatch(r"[\w.-]+", pattern):
                self._index_of[pattern] = index
            else:
                self._expressions.append((index, _expression(pattern)))
        if len(self._expressions) > MAX_EXPRESSIONS:
            raise ValueError(
                f"{len(self._expressions)} regular expressions, at most {MAX_EXPRESSIONS}"
            )
        self._numbers = list(self.values.values())

    def get(self, module: str, default: float) -> float:
        """The value of the first pattern that fits a module's full name."""
        indices = [self._index_of[end] for end in _ends(module) if end in self._index_of]
        indices += [index for index, pattern in self._expressions if pattern.match(module)]
        return self._numbers[min(indices)] if indices else default


def _ends(module: str) -> Iterable[str]:
    parts = module.split(".")
    return (".".join(parts[n:]) for n in range(len(parts)))


def _expression(pattern: str) -> re.Pattern[str]:
    repeats = len(re.findall(r"[*+{]", pattern))
    nested = re.search(r"\)[*+?{]|\\[1-9]|\(\?(?!:)", pattern)
    if len(pattern) > MAX_PATTERN_CHARS or repeats > MAX_PATTERN_REPEATS or nested:
        raise ValueError(f"the pattern {pattern[:60]!r} is too complex to be matched safely")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {pattern[:60]!r} is wrong: {error}") from error


@dataclass(frozen=True)
class PeftConfig:
    """Settings of an adapter's matrices. Dropout matters to training only.

    `rank_pattern` and `alpha_pattern` override rank and alpha of the modules they match.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r: the factor of B A where no pattern matches."""
        return self._scale(self.alpha, self.rank)

    @property
    def uniform(self) -> bool:
        """Whether all modules have one rank and one alpha."""
        return not self.rank_pattern and not self.alpha_pattern

    def rank_of(self, module: str) -> int:
        """The rank of a module (full published name)."""
        return int(self._ranks.get(module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of B A of a module (full published name)."""
        return self._scale(self._alphas.get(module, self.alpha), self.rank_of(module))

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    @staticmethod
    def read(folder: Path) -> PeftConfig:
        """The config of an untrusted adapter folder.

        Raises CheckpointError when it is missing or damaged, and for variants of LoRA (DoRA, …):
        merging those as if they were plain would be wrong without a sign.
        """
        file = folder / PEFT_CONFIG
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; PEFT's adapters need it for their scale")
        return PeftConfig.parse(read_document(file, MAX_CONFIG_BYTES), str(file))

    @staticmethod
    def parse(document: dict[str, Any], file: str) -> PeftConfig:
        """The config in an untrusted JSON object; `file` is its name in errors, as in `read`."""
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
        return PeftConfig(
            int(rank),
            float(alpha),
            float(dropout),
            rslora,
            _patterns(file, document, "rank_pattern"),
            _patterns(file, document, "alpha_pattern"),
        )

    def document(self, targets: Sequence[str], base: str | None) -> dict[str, Any]:
        """The JSON object for adapters on `targets`, published module names in full."""
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": _short(self.alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": list(targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "rank_pattern": {name: int(rank) for name, rank in self.rank_pattern.items()},
            "alpha_pattern": {name: _short(alpha) for name, alpha in self.alpha_pattern.items()},
            "use_dora": False,
            "inference_mode": True,
        }


def _short(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _patterns(file: str, document: dict[str, Any], key: str) -> dict[str, float]:
    values = document.get(key) or {}
    if not isinstance(values, dict):
        raise _wrong(file, key, values, "an object, pattern → number")
    for pattern in values:
        number = _number(file, values, pattern)
        if key == "rank_pattern" and (number != int(number) or number < 1):
            raise _wrong(file, f"{key} of {pattern[:60]!r}", number, "a whole number from 1")
    try:
        Patterns(values)
    except ValueError as error:
        raise CheckpointError(f"{file}: {key}: {error}") from error
    return values


def _number(file: str, document: dict[str, Any], key: str, default: Any = None) -> float:
    value = document.get(key, default)
    # Compared, not converted: JSON's whole numbers may be too large for a float; NaN fails too.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -MAX_NUMBER < value < MAX_NUMBER:
        raise _wrong(file, key, value, "a number, not NaN or infinite")
    return value


def _wrong(file: str, key: str, value: Any, wanted: str) -> CheckpointError:
    text = repr(value)[:40]
    return CheckpointError(
        f"{file} is not the config of a PEFT adapter: {key} is {text}, expected {wanted}"
    )


def _refuse_variants(file: str, document: dict[str, Any]) -> None:
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
    named = key.startswith("use_") or key.endswith("_config")
    return key in NOT_PLAIN or (named and key not in HARMLESS)
