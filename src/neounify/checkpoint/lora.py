"""LoRA while loading: low-rank updates that are added to the weights as they are read.

W ← W + strength · scale · up @ down, computed in float32 and cast once, after the last of
several files. Everything is checked before anything is merged. The formats are those of
checkpoint/lora_file.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor

from neounify.checkpoint.lora_file import read_lora_file
from neounify.checkpoint.peft_config import MAX_NUMBER
from neounify.checkpoint.reader import listed
from neounify.errors import CheckpointError, RequestError

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
    """The updates of one or many LoRAs: our tensor name → updates, in the files' order.

    Each is a file of a form that checkpoint/lora_file.py reads, or a PEFT folder. `strength` is
    that of those given without their own; `expected` maps our tensor names to shapes. Raises one
    CheckpointError that lists every unknown target, missing half, wrong shape and value that is
    not finite, of all files.
    """
    updates: dict[str, tuple[LoraUpdate, ...]] = {}
    problems: list[str] = []
    for path, factor in _with_strengths(lora, strength):
        file = read_lora_file(Path(path), expected)
        mine = [] if abs(factor) <= MAX_NUMBER else [f"strength {factor} is not a number in range"]
        problems += [f"{Path(path).name}: {problem}" for problem in (*mine, *file.problems)]
        for name, pair in file.pairs.items():
            scale = factor * pair.scale
            if not abs(scale) <= MAX_NUMBER:
                problems.append(f"{Path(path).name}: strength {factor} makes the scale {scale:g}")
                break
            update = LoraUpdate(pair.up, pair.down, scale)
            updates[name] = (*updates.get(name, ()), update)
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
