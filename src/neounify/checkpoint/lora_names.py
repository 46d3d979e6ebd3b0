"""Names in LoRA files: which weight of the model and which half of its update a tensor is.

Trainers write the same matrices under other names. A key is [PREFIX]NAME.HALF: NAME is the
published name of a module, or that name with underscores for dots (kohya's tools), HALF one of
`HALVES`, PEFT's with or without the name of an adapter (`lora_A.default.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from neounify.checkpoint.names import from_published, to_published

Half = Literal["down", "up", "alpha"]

PAIRS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A", "lora_B"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
"""What the two matrices are called: [r, in], [out, r]."""
ALPHA = "alpha"
HALVES: dict[str, Half] = {
    **{down: "down" for down, _ in PAIRS},
    **{up: "up" for _, up in PAIRS},
    ALPHA: "alpha",
}

PREFIXES = ("base_model", "model", "diffusion_model", "transformer", "unet", "dit", "module")
"""First parts that names may have in front of the published one, also several of them."""
FLAT_PREFIXES = ("lora", "lycoris", "unet", "te", "te1", "te2", "te3", *PREFIXES)

_ADAPTER = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")
_VARIANTS = {
    "DoRA": r"dora_scale|lora_magnitude_vector(\.\w+)*",
    "LoHa": r"hada_\w+",
    "LoKr": r"lokr_\w+",
    "OFT": r"b?oft_\w+(\.\w+)*",
    "(IA)³": r"ia3_\w+(\.\w+)*|on_input",
    "LoCon with a middle matrix": r"lora_mid\.weight",
    "full difference": r"diff|diff_b",
    "LoRA with biases": r"lora_B(\.\w+)?\.bias",
    "embedding LoRA": r"lora_embedding_[AB](\.\w+)*",
}
_VARIANT_PATTERNS = {kind: re.compile(rf"(^|\.)({ending})$") for kind, ending in _VARIANTS.items()}


@dataclass(frozen=True)
class LoraKey:
    """One key, taken apart: the module's name as it is written, and what its tensor is."""

    target: str
    half: Half
    spelling: str


def split_key(key: str) -> LoraKey | None:
    """None for a key that is no half of a plain LoRA."""
    plain = _ADAPTER.sub(r".\1.weight", key)
    for spelling, half in HALVES.items():
        if plain.endswith(f".{spelling}"):
            return LoraKey(plain.removesuffix(f".{spelling}"), half, spelling)
    return None


def variant_of(key: str) -> str | None:
    """The kind of adapter that a key belongs to, where it is one that is more than B A."""
    for kind, pattern in _VARIANT_PATTERNS.items():
        if pattern.search(key):
            return kind
    return None


def partner(spelling: str) -> str:
    """What the other matrix of a pair is called."""
    for down, up in PAIRS:
        if spelling in (down, up):
            return up if spelling == down else down
    raise KeyError(spelling)


class ModuleNames:
    """The names that a model's weights (our names) may have in a LoRA file."""

    def __init__(self, weights: Iterable[str]) -> None:
        self._weights = {name for name in weights if name.endswith(".weight")}
        self._flat: dict[str, str | None] = {}
        for name in self._weights:
            flat = module_name(name).replace(".", "_")
            # Two modules of one flat name would be a guess: neither is found by it.
            self._flat[flat] = None if flat in self._flat else name

    def find(self, target: str) -> str | None:
        """Our name of the weight that a module's written name means, None if there is none."""
        if "." not in target:
            found = self._flat_name(target)
            if found is not None:
                return found
        while True:
            name = from_published(f"{target}.weight")
            if name in self._weights:
                return name
            first, dot, rest = target.partition(".")
            if not dot or first not in PREFIXES:
                return None
            target = rest

    def _flat_name(self, target: str) -> str | None:
        while True:
            if target in self._flat:
                return self._flat[target]
            prefix = next((p for p in FLAT_PREFIXES if target.startswith(f"{p}_")), None)
            if prefix is None:
                return None
            target = target.removeprefix(f"{prefix}_")


def module_name(weight: str) -> str:
    """The published name of the module that a weight (our name) is of."""
    return to_published(weight).removesuffix(".weight")
