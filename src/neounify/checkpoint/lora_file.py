"""LoRA on disk, in either of two formats that are told apart by content.

    published   NAME.lora_down.weight, NAME.lora_up.weight, NAME.alpha   in one file
    PEFT        NAME.lora_A.weight, NAME.lora_B.weight                   beside a config

NAME is the published name of a module. Both mean W ← W + scale · up @ down, where
scale = alpha / r, or alpha / √r where PEFT's config says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from neounify.checkpoint.finite import all_finite
from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.names import from_published
from neounify.checkpoint.peft_config import PEFT_CONFIG, PEFT_WEIGHTS, PeftConfig
from neounify.errors import CheckpointError

MAX_RANK = 8192


@dataclass(frozen=True)
class Spelling:
    """How a format writes its keys: [prefix]NAME.half."""

    prefix: str
    down: str
    up: str
    alpha: str | None = None

    @property
    def halves(self) -> tuple[str, ...]:
        return (self.down, self.up) if self.alpha is None else (self.down, self.up, self.alpha)


PUBLISHED = Spelling("diffusion_model.", "lora_down.weight", "lora_up.weight", "alpha")
PEFT = Spelling("base_model.model.", "lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class LoraPair:
    """`scale` · `up` [out, r] @ `down` [r, in] on one weight; a kernel's `in` is flattened."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """What is usable in a file (our weight name → pair), and one line for all that is not."""

    pairs: Mapping[str, LoraPair]
    problems: tuple[str, ...]
    config: PeftConfig | None
    """None for the published format."""


def read_lora_file(path: Path, expected: Mapping[str, torch.Size]) -> LoraFile:
    """Read a file of either format, or a PEFT folder; `expected` maps our names to shapes.

    The pairs are views of the mapped file. Raises CheckpointError for what is no such file;
    tensors that are wrong are collected as problems.
    """
    if path.is_dir():
        _check_folder(path)
        path = path / PEFT_WEIGHTS
    file = MappedFile(path)
    spelling, config = PUBLISHED, None
    if path.name == PEFT_WEIGHTS or any(key.endswith(PEFT.halves) for key in file.tensors):
        spelling, config = PEFT, PeftConfig.read(path.parent)
    return _Reader(file, spelling, config, expected).read()


def _check_folder(folder: Path) -> None:
    if (folder / PEFT_WEIGHTS).is_file():
        return
    pickles = " (its .bin files are pickles, which can run code when read and are never opened)"
    raise CheckpointError(
        f"{folder} holds no {PEFT_WEIGHTS}{pickles if any(folder.glob('*.bin')) else ''}; a LoRA "
        f"is a folder with that file and {PEFT_CONFIG}, or one file of the published kind"
    )


class _Reader:
    """Reads one file, collecting problems instead of stopping at the first."""

    def __init__(
        self,
        file: MappedFile,
        spelling: Spelling,
        config: PeftConfig | None,
        expected: Mapping[str, torch.Size],
    ) -> None:
        self.file, self.spelling, self.config = file, spelling, config
        self.expected = expected
        self.problems: list[str] = []

    def read(self) -> LoraFile:
        if not self.file.tensors:
            self.problems.append("the file holds no tensors")
        pairs: dict[str, LoraPair] = {}
        for target, keys in self._targets().items():
            name = from_published(f"{target}.weight")
            problem: str | None = f"{target} is not a weight of this model"
            if name is not None and name in self.expected:
                problem = self._problem(target, keys, self.expected[name])
            if problem:
                self.problems.append(problem)
            elif name is not None:
                pairs[name] = self._pair(keys)
        return LoraFile(pairs, tuple(self.problems), self.config)

    def _targets(self) -> dict[str, dict[str, str]]:
        """Target → which of its halves is stored under which key."""
        targets: dict[str, dict[str, str]] = {}
        prefix, known = self.spelling.prefix, self.spelling.halves
        for key in self.file.tensors:
            name = key.removeprefix(prefix)
            half = next((h for h in known if name.endswith(f".{h}")), None)
            if half is None:
                first, last = ", ".join(f"NAME.{h}" for h in known[:-1]), f"NAME.{known[-1]}"
                self.problems.append(f"{key} is neither {first} nor {last}")
                continue
            halves = targets.setdefault(name.removesuffix(f".{half}"), {})
            if half in halves:
                self.problems.append(f"{key} is stored with and without the prefix {prefix}")
            halves[half] = key
        return targets

    def _problem(self, target: str, keys: dict[str, str], weight: torch.Size) -> str | None:
        """What is wrong with a target's tensors, None if nothing."""
        missing = [half for half in self.spelling.halves[:2] if half not in keys]
        if missing:
            return f"{target} has no {' and no '.join(missing)}"
        down, up = self._halves(keys)
        return (
            self._misfit(target, weight, down, up)
            or self._wrong_alpha(target, keys)
            or self._wrong_values(target, keys, down, up)
        )

    def _misfit(self, target: str, weight: torch.Size, down: Tensor, up: Tensor) -> str | None:
        rank, size_in = down.shape[0] if down.ndim else 0, math.prod(weight[1:])
        downs = {(rank, size_in), (rank, *weight[1:])}
        ups = {(weight[0], rank), (weight[0], rank, *(1 for _ in weight[2:]))}
        if len(weight) < 2 or rank < 1 or down.shape not in downs or up.shape not in ups:
            low, high = (half.partition(".")[0] for half in self.spelling.halves[:2])
            return (
                f"{target} of shape {list(weight)} cannot take {low} {list(down.shape)} and "
                f"{high} {list(up.shape)}; expected [r, {size_in}] and [{weight[0]}, r]"
            )
        if rank > MAX_RANK:
            return f"{target} has rank {rank}, more than the {MAX_RANK} allowed"
        if self.config is not None and rank != self.config.rank:
            return f"{target} has rank {rank}, {PEFT_CONFIG} says {self.config.rank}"
        if not (down.is_floating_point() and up.is_floating_point()):
            return f"{target} is stored as {down.dtype} and {up.dtype}, expected floats"
        return None

    def _wrong_alpha(self, target: str, keys: dict[str, str]) -> str | None:
        shape = self.file.tensors[keys["alpha"]].shape if "alpha" in keys else ()
        if math.prod(shape) != 1:
            return f"{target}: alpha has shape {list(shape)}, expected a scalar"
        return None

    def _wrong_values(
        self, target: str, keys: dict[str, str], down: Tensor, up: Tensor
    ) -> str | None:
        if all_finite(down) and all_finite(up) and math.isfinite(self._scale(keys, down.shape[0])):
            return None
        return f"{target} holds NaN or infinite values"

    def _halves(self, keys: dict[str, str]) -> tuple[Tensor, Tensor]:
        return self.file.tensor(keys[self.spelling.down]), self.file.tensor(keys[self.spelling.up])

    def _scale(self, keys: dict[str, str], rank: int) -> float:
        if self.config is not None:
            return self.config.scale
        return float(self.file.tensor(keys["alpha"]).item()) / rank if "alpha" in keys else 1.0

    def _pair(self, keys: dict[str, str]) -> LoraPair:
        down, up = self._halves(keys)
        return LoraPair(down.flatten(1), up.flatten(1), self._scale(keys, down.shape[0]))
