"""LoRA files of any format that trainers write, recognised by content.

    published   NAME.lora_down.weight, NAME.lora_up.weight, NAME.alpha   in one file
    PEFT        NAME.lora_A.weight, NAME.lora_B.weight                   beside a config

and what lies between: pairs of either kind without a config or alpha, with prefixes, flattened
names. All mean W ← W + strength · scale · up @ down, computed in float32 and cast once, after the
last of several files. The scale of a module is, in this order, that of its own alpha (alpha / r),
of PEFT's config (alpha / r, or alpha / √r), of an alpha in the file's metadata, or 1. Everything is
checked before anything is merged.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from neounify.checkpoint.mapped import MappedFile, all_finite
from neounify.checkpoint.names import TABLES, from_published, to_published
from neounify.checkpoint.peft_config import (
    MAX_CONFIG_BYTES,
    MAX_NUMBER,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PeftConfig,
)
from neounify.checkpoint.reader import files_ending, listed
from neounify.config.families import SENSENOVA_U1
from neounify.errors import CheckpointError, RequestError

Half = Literal["down", "up", "alpha"]

PAIRS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A", "lora_B"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
"""Names of the two matrices: [r, in], [out, r]."""
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
    """The name of the other matrix of a pair."""
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
            for flat in _flat_names(name):
                # Two modules of one flat name would be a guess: neither is found by it.
                self._flat[flat] = None if flat in self._flat else name

    def find(self, target: str) -> str | None:
        """Our name of the weight that a module's written name means, None if there is none."""
        if "." not in target:
            flat_name = self._flat_name(target)
            if flat_name is not None:
                return flat_name
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


def module_name(weight: str, family: str = SENSENOVA_U1) -> str:
    """A family's published name of the module that a weight (our name) is of."""
    return to_published(weight, family).removesuffix(".weight")


def _flat_names(weight: str) -> set[str]:
    """The names of the module that a weight (our name) is of, in every family that has it."""
    flat = set()
    for family in TABLES:
        with suppress(KeyError):
            flat.add(module_name(weight, family).replace(".", "_"))
    return flat


MAX_RANK = 8192
MAX_NAMED = 3
"""Names that a message lists, of many."""

METADATA_CONFIG = "lora_adapter_metadata"
"""Key of a file's metadata under which diffusers keeps PEFT's config."""
METADATA_ALPHAS = ("ss_network_alpha", "lora_alpha", "alpha")


@dataclass(frozen=True)
class LoraPair:
    """`scale` · `up` [out, r] @ `down` [r, in] on one weight; a kernel's `in` is flattened."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def to(self, device: torch.device) -> LoraPair:
        """A float32 copy on a device."""
        return LoraPair(
            self.down.to(device, torch.float32), self.up.to(device, torch.float32), self.scale
        )

    def add_to(self, rows: Tensor, start: int) -> None:
        """Add its rows `start`… in place to those rows of a float32 weight."""
        up = self.up[start : start + rows.shape[0]]
        rows.view(rows.shape[0], -1).addmm_(up, self.down, alpha=self.scale)


@dataclass(frozen=True)
class LoraFile:
    """Usable pairs of a file (our weight name → pair), and one line about the unusable rest."""

    pairs: Mapping[str, LoraPair]
    problems: tuple[str, ...]
    config: PeftConfig | None
    """That of the file, None where it has none."""


@dataclass(frozen=True)
class _Entry:
    """A stored tensor and its key, taken apart."""

    key: str
    parts: LoraKey


def read_lora_file(
    path: Path, expected: Mapping[str, torch.Size], family: str = SENSENOVA_U1
) -> LoraFile:
    """Read a file of any form, or a PEFT folder; `expected` maps our names to shapes.

    The pairs are views of the mapped file. Raises CheckpointError for what is no such file or
    more than plain LoRA (DoRA, LoHa, LoKr, …); tensors that are wrong are collected as problems.
    """
    file = MappedFile(_weights_of(path) if path.is_dir() else path)
    _refuse_variants(file)
    return _Reader(file, _config(file), expected, family).read()


def _weights_of(folder: Path) -> Path:
    """The file of a folder: PEFT's, or the only .safetensors file, as diffusers saves it."""
    if (folder / PEFT_WEIGHTS).is_file():
        return folder / PEFT_WEIGHTS
    files = files_ending(folder, ".safetensors")
    if len(files) == 1:
        return files[0]
    pickles = ""
    if files_ending(folder, ".bin"):
        pickles = " (its .bin files are pickles, which can run code when read and are never opened)"
    raise CheckpointError(
        f"{folder} holds no {PEFT_WEIGHTS}{pickles}; a LoRA "
        f"is a folder with that file and {PEFT_CONFIG}, or one .safetensors file"
    )


def _refuse_variants(file: MappedFile) -> None:
    kinds: dict[str, list[str]] = {}
    for key in file.tensors:
        kind = variant_of(key)
        if kind is not None:
            kinds.setdefault(kind, []).append(key)
    if kinds:
        kind, keys = max(kinds.items(), key=lambda item: len(item[1]))
        raise CheckpointError(
            f"{file.path} is no plain LoRA but of the kind {kind} ({_several(keys)}), which is not "
            "supported; merge it into the weights with the tool that trained it"
        )


def _config(file: MappedFile) -> PeftConfig | None:
    """The file's PEFT config: beside it, or in its metadata. Raises CheckpointError."""
    peft = any(".lora_A" in key for key in file.tensors)
    beside = file.path.parent / PEFT_CONFIG
    if file.path.name == PEFT_WEIGHTS or (peft and beside.is_file()):
        return PeftConfig.read(file.path.parent)
    text = file.metadata.get(METADATA_CONFIG)
    if not isinstance(text, str) or len(text) > MAX_CONFIG_BYTES:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    # diffusers puts the name of the part in front: "transformer.r".
    fields = {key.rpartition(".")[2]: value for key, value in document.items()}
    if not {"r", "lora_alpha"} <= fields.keys():
        return None
    return PeftConfig.parse({"peft_type": "LORA", **fields}, f"{file.path} ({METADATA_CONFIG})")


class _Reader:
    """Reads one file, collecting problems instead of stopping at the first."""

    def __init__(
        self,
        file: MappedFile,
        config: PeftConfig | None,
        expected: Mapping[str, torch.Size],
        family: str,
    ) -> None:
        self.file, self.config, self.expected = file, config, expected
        self.names, self.family = ModuleNames(expected), family
        self.alpha = _metadata_alpha(file.metadata)
        self.problems: list[str] = []

    def read(self) -> LoraFile:
        if not self.file.tensors:
            self.problems.append("the file holds no tensors")
        pairs: dict[str, LoraPair] = {}
        for name, halves in self._placed().items():
            target = module_name(name, self.family)
            problem = self._problem(target, halves, self.expected[name])
            if problem:
                self.problems.append(problem)
            else:
                down, up = (self.file.tensor(halves[half].key) for half in ("down", "up"))
                scale = self._scale(target, halves, down.shape[0])
                pairs[name] = LoraPair(down.flatten(1), up.flatten(1), scale)
        return LoraFile(pairs, tuple(self.problems), self.config)

    def _placed(self) -> dict[str, dict[str, _Entry]]:
        """Our weight name → its entries by half; what has no place becomes a problem."""
        placed: dict[str, dict[str, _Entry]] = {}
        foreign: list[str] = []
        unknown: dict[str, None] = {}
        for key in self.file.tensors:
            parts = split_key(key)
            if parts is None:
                foreign.append(key)
                continue
            name = self.names.find(parts.target)
            if name is None:
                unknown[parts.target] = None
                continue
            halves = placed.setdefault(name, {})
            if parts.half in halves:
                first = halves[parts.half].key
                module = module_name(name, self.family)
                self.problems.append(f"{module} is stored twice, as {first} and {key}")
            halves[parts.half] = _Entry(key, parts)
        if unknown:
            self.problems.append(_unplaced(list(unknown), len(unknown) + len(placed)))
        if foreign:
            self.problems.append(
                f"no part of a LoRA, as NAME.lora_down.weight with NAME.lora_up.weight or "
                f"NAME.lora_A.weight with NAME.lora_B.weight: {_several(foreign)}"
            )
        return placed

    def _problem(self, target: str, halves: dict[str, _Entry], weight: torch.Size) -> str | None:
        """The problem of a module's tensors, None if there is none."""
        there = [halves[half] for half in ("down", "up") if half in halves]
        if len(there) == 1:
            return f"{target} has no {partner(there[0].parts.spelling)}"
        if not there:
            return f"{target} has an alpha, but no matrices"
        down, up = (self.file.tensor(entry.key) for entry in there)
        problem = self._misfit(target, weight, there, down, up) or self._wrong_alpha(target, halves)
        if problem is not None:
            return problem
        scale = self._scale(target, halves, down.shape[0])
        if not (all_finite(down) and all_finite(up) and math.isfinite(scale)):
            return f"{target} holds NaN or infinite values"
        return f"{target} has the scale {scale:g}" if abs(scale) > MAX_NUMBER else None

    def _misfit(
        self, target: str, weight: torch.Size, there: list[_Entry], down: Tensor, up: Tensor
    ) -> str | None:
        rank, size_in = down.shape[0] if down.ndim else 0, math.prod(weight[1:])
        downs = {(rank, size_in), (rank, *weight[1:])}
        ups = {(weight[0], rank), (weight[0], rank, *(1 for _ in weight[2:]))}
        if len(weight) < 2 or rank < 1 or down.shape not in downs or up.shape not in ups:
            low, high = (entry.parts.spelling.removesuffix(".weight") for entry in there)
            return (
                f"{target} of shape {list(weight)} cannot take {low} {list(down.shape)} and "
                f"{high} {list(up.shape)}; expected [r, {size_in}] and [{weight[0]}, r]"
            )
        if rank > MAX_RANK:
            return f"{target} has rank {rank}, more than the {MAX_RANK} allowed"
        if self.config is not None and rank != self.config.rank_of(target):
            return f"{target} has rank {rank}, {PEFT_CONFIG} says {self.config.rank_of(target)}"
        if not (down.is_floating_point() and up.is_floating_point()):
            return f"{target} is stored as {down.dtype} and {up.dtype}, expected floats"
        return None

    def _wrong_alpha(self, target: str, halves: dict[str, _Entry]) -> str | None:
        shape = self.file.tensors[halves["alpha"].key].shape if "alpha" in halves else ()
        if math.prod(shape) != 1:
            return f"{target}: alpha has shape {list(shape)}, expected a scalar"
        return None

    def _scale(self, target: str, halves: dict[str, _Entry], rank: int) -> float:
        if "alpha" in halves:
            return float(self.file.tensor(halves["alpha"].key).item()) / rank
        if self.config is not None:
            return self.config.scale_of(target)
        return 1.0 if self.alpha is None else self.alpha / rank


def _metadata_alpha(metadata: Mapping[str, str]) -> float | None:
    for key in METADATA_ALPHAS:
        try:
            alpha = float(metadata[key])
        except (KeyError, TypeError, ValueError):  # "Dynamic", "None": no number for all modules
            continue
        if math.isfinite(alpha):
            return alpha
    return None


def _unplaced(targets: list[str], total: int) -> str:
    if len(targets) == 1:
        return f"{targets[0]} is not a weight of this model"
    return f"{len(targets)} of {total} modules are not in this model: {_several(targets)}"


def _several(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


PathLike: TypeAlias = str | os.PathLike[str]
LoraSpec: TypeAlias = PathLike | tuple[PathLike, float]
"""A file or PEFT folder, alone or with its strength."""


def read_loras(
    lora: LoraSpec | Sequence[LoraSpec] | None,
    strength: float,
    expected: Mapping[str, torch.Size],
    family: str = SENSENOVA_U1,
) -> dict[str, tuple[LoraPair, ...]]:
    """The pairs of one or many LoRAs: our tensor name → pairs, in the files' order.

    Each is a file as `read_lora_file` takes it, or a PEFT folder. `strength` is
    that of those given without their own; `expected` maps our tensor names to shapes, `family` is
    the model's. Raises one CheckpointError that lists every unknown target, missing half, wrong
    shape and value that is not finite, of all files.
    """
    updates: dict[str, tuple[LoraPair, ...]] = {}
    problems: list[str] = []
    for path, factor in _with_strengths(lora, strength):
        file = read_lora_file(Path(path), expected, family)
        mine = [] if abs(factor) <= MAX_NUMBER else [f"strength {factor} is not a number in range"]
        problems += [f"{Path(path).name}: {problem}" for problem in (*mine, *file.problems)]
        for name, pair in file.pairs.items():
            scale = factor * pair.scale
            if not abs(scale) <= MAX_NUMBER:
                problems.append(f"{Path(path).name}: strength {factor} makes the scale {scale:g}")
                break
            updates[name] = (*updates.get(name, ()), LoraPair(pair.down, pair.up, scale))
    if problems:
        raise CheckpointError(
            f"the LoRA does not fit the model, nothing was merged; problems: {len(problems)}\n"
            + "\n".join(listed(problems))
        )
    return updates


def _with_strengths(
    lora: LoraSpec | Sequence[LoraSpec] | None, strength: float
) -> list[tuple[PathLike, float]]:
    if lora is None:
        return []
    if isinstance(lora, str | os.PathLike):
        if not isinstance(strength, int | float):
            raise RequestError(f"the strength of a LoRA is {strength!r}, not a number")
        return [(lora, strength)]
    if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], int | float):
        return [(lora[0], float(lora[1]))]
    if not isinstance(lora, Sequence):
        raise RequestError(f"{lora!r:.80} is no LoRA: give a path, (path, strength), or a list")
    pairs: list[tuple[PathLike, float]] = []
    for item in cast("Sequence[LoraSpec]", lora):
        pairs += _with_strengths(item, strength)
    return pairs
