"""LoRA files: low-rank updates that are added to the weights while they load.

Two kinds, told apart by what they are: a file of the published models (lora_down, lora_up, alpha),
or a folder of PEFT's (adapter_config.json beside lora_A and lora_B).

W ← W + strength · alpha/r · up @ down, computed in float32 and cast once, after
the last of several files. Everything is checked before anything is merged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from neounify.checkpoint.finite import all_finite
from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.names import from_published
from neounify.checkpoint.reader import listed
from neounify.errors import CheckpointError

PREFIX = "diffusion_model."
HALVES = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_HALVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
MAX_CONFIG_BYTES = 2**20

PathLike: TypeAlias = str | os.PathLike[str]
LoraSpec: TypeAlias = PathLike | tuple[PathLike, float]


@dataclass(frozen=True)
class LoraUpdate:
    """One update of one weight: `scale` · `up` [out, r] @ `down` [r, in], `in` flattened."""

    up: Tensor
    down: Tensor
    scale: float

    def to(self, device: torch.device) -> LoraUpdate:
        """A float32 copy on a device."""
        return LoraUpdate(
            self.up.to(device, torch.float32), self.down.to(device, torch.float32), self.scale
        )

    def add_to(self, rows: Tensor, start: int) -> None:
        """Add this update's rows `start`… in place to those rows of a float32 weight."""
        up = self.up[start : start + rows.shape[0]]
        rows.view(rows.shape[0], -1).addmm_(up, self.down, alpha=self.scale)


def read_loras(
    lora: LoraSpec | Sequence[LoraSpec] | None,
    strength: float,
    expected: Mapping[str, torch.Size],
) -> dict[str, tuple[LoraUpdate, ...]]:
    """The updates of one or many LoRA files: our tensor name → updates, in the files' order.

    `strength` is that of files given without their own; `expected` maps our tensor names to
    shapes. Raises one CheckpointError that lists every unknown target, missing half, wrong
    shape and value that is not finite, of all files.
    """
    updates: dict[str, tuple[LoraUpdate, ...]] = {}
    problems: list[str] = []
    for path, file_strength in _with_strengths(lora, strength):
        alpha = None
        if Path(path).is_dir():
            alpha = _peft_alpha(Path(path))
            path = Path(path) / PEFT_WEIGHTS
        reader = _LoraFile(MappedFile(path), file_strength, expected, alpha)
        for name, update in reader.updates.items():
            updates[name] = (*updates.get(name, ()), update)
        problems += reader.problems
    if problems:
        raise CheckpointError(
            f"the LoRA does not fit the model, nothing was merged; problems: {len(problems)}\n"
            + "\n".join(listed(problems))
        )
    return updates


class _LoraFile:
    """Reads one file into updates, collecting problems instead of stopping at the first."""

    def __init__(
        self,
        file: MappedFile,
        strength: float,
        expected: Mapping[str, torch.Size],
        peft: PeftAlpha | None = None,
    ) -> None:
        self.peft = peft
        self.file = file
        self.strength = strength
        self.expected = expected
        self.problems: list[str] = []
        self.updates: dict[str, LoraUpdate] = {}
        if not math.isfinite(strength):
            self._problem(f"strength {strength} is not a number")
        if not file.tensors:
            self._problem("the file holds no tensors")
        for target, keys in self._targets().items():
            update = self._update(target, keys)
            if update is not None:
                self.updates[update[0]] = update[1]

    def _problem(self, what: str) -> None:
        self.problems.append(f"{self.file.path.name}: {what}")

    def _targets(self) -> dict[str, dict[str, str]]:
        """Target → which of its halves is stored under which key."""
        targets: dict[str, dict[str, str]] = {}
        for key in self.file.tensors:
            name = key.removeprefix(PREFIX if self.peft is None else PEFT_PREFIX)
            if self.peft is not None:
                for theirs, ours in PEFT_HALVES.items():
                    if name.endswith(f".{theirs}"):
                        name = name.removesuffix(theirs) + ours
            half = next((h for h in HALVES if name.endswith(f".{h}")), None)
            if half is None:
                self._problem(f"{key} is neither NAME.lora_down.weight, .lora_up.weight nor .alpha")
                continue
            halves = targets.setdefault(name.removesuffix(f".{half}"), {})
            if half in halves:
                self._problem(f"{key} is stored with and without the prefix {PREFIX}")
            halves[half] = key
        return targets

    def _update(self, target: str, keys: dict[str, str]) -> tuple[str, LoraUpdate] | None:
        name = from_published(f"{target}.weight")
        if name is None or name not in self.expected:
            self._problem(f"{target} is not a weight of this model")
            return None
        missing = [half for half in HALVES[:2] if half not in keys]
        if missing:
            self._problem(f"{target} has no {' and no '.join(missing)}")
            return None
        down, up = (self._tensor(keys[half]) for half in HALVES[:2])
        rank = down.shape[0] if down.ndim else 0
        if not self._fits(target, self.expected[name], down, up, rank):
            return None
        alpha = float(rank) if self.peft is None else self.peft.of(rank)
        if "alpha" in keys:
            stored = self._tensor(keys["alpha"])
            if stored.numel() != 1:
                self._problem(f"{target}: alpha has shape {list(stored.shape)}, expected a scalar")
                return None
            alpha = float(stored.item())
        finite = all_finite(down) and all_finite(up) and math.isfinite(alpha)
        if not finite:
            self._problem(f"{target} holds NaN or infinite values")
            return None
        update = LoraUpdate(up.flatten(1), down.flatten(1), self.strength * alpha / rank)
        return name, update

    def _tensor(self, key: str) -> Tensor:
        return self.file.tensor(key)

    def _fits(self, target: str, weight: torch.Size, down: Tensor, up: Tensor, rank: int) -> bool:
        size_in = math.prod(weight[1:])
        downs = {(rank, size_in), (rank, *weight[1:])}
        ups = {(weight[0], rank), (weight[0], rank, *(1 for _ in weight[2:]))}
        fits = len(weight) >= 2 and rank > 0 and down.shape in downs and up.shape in ups
        floats = down.is_floating_point() and up.is_floating_point()
        if not fits:
            self._problem(
                f"{target} of shape {list(weight)} cannot take lora_down {list(down.shape)} and "
                f"lora_up {list(up.shape)}; expected [r, {size_in}] and [{weight[0]}, r]"
            )
        elif not floats:
            self._problem(f"{target} is stored as {down.dtype} and {up.dtype}, expected floats")
        return fits and floats


@dataclass(frozen=True)
class PeftAlpha:
    """What PEFT's config says of the scale; `of` gives the alpha that alpha / r makes of it."""

    alpha: float
    rslora: bool

    def of(self, rank: int) -> float:
        return self.alpha * math.sqrt(rank) if self.rslora else self.alpha


def _peft_alpha(folder: Path) -> PeftAlpha:
    """Read a PEFT folder's config. Raises CheckpointError for what is not plain LoRA."""
    file = folder / PEFT_CONFIG
    if not (folder / PEFT_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} holds no {PEFT_WEIGHTS}; adapters in .bin files are pickles and not read"
        )
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{file} is larger than {MAX_CONFIG_BYTES} bytes")
        document = json.loads(file.read_text(encoding="utf-8"))
        alpha, rslora = float(document["lora_alpha"]), bool(document.get("use_rslora", False))
        plain = document["peft_type"] == "LORA" and document.get("bias", "none") == "none"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not the config of a PEFT adapter: {error}") from error
    special = ("use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "modules_to_save")
    used = [key for key in special if document.get(key)]
    if not plain or used:
        raise CheckpointError(f"{file}: only plain LoRA can be merged, this uses {used or 'more'}")
    return PeftAlpha(alpha, rslora)


def _with_strengths(
    lora: LoraSpec | Sequence[LoraSpec] | None, strength: float
) -> list[tuple[PathLike, float]]:
    if lora is None:
        return []
    if isinstance(lora, str | os.PathLike):
        return [(lora, strength)]
    if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], int | float):
        return [(lora[0], float(lora[1]))]
    pairs: list[tuple[PathLike, float]] = []
    for item in lora:
        pairs += _with_strengths(item, strength)
    return pairs
