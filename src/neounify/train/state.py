"""Training state on disk: written aside and moved into place, so that a kill loses nothing.

A state is a folder `step-00001000` with three safetensors files (weights, their running mean,
optimizer states) and state.json with the rest. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.errors import CheckpointError

NAME = re.compile(r"step-(\d{8,})")
FILES = ("model", "ema", "optimizer")


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any]
) -> Path:
    """Write `tensors` (by file: model, ema, optimizer) and `facts` as the state of a step.

    Raises CheckpointError when the disk is full or not writable; earlier states stay.
    """
    target = folder / f"step-{step:08d}"
    aside = folder / f".{target.name}.{secrets.token_hex(4)}.saving"
    try:
        aside.mkdir(parents=True)
        for name in FILES:
            save_file(
                {k: v.contiguous() for k, v in tensors[name].items()}, aside / f"{name}.safetensors"
            )
        (aside / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the training state {target} could not be saved: {error}; earlier ones are unchanged"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def prune_states(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` states."""
    for path in saved_states(folder)[: -max(1, keep)]:
        shutil.rmtree(path, ignore_errors=True)


def saved_states(folder: Path) -> list[Path]:
    """The complete states of a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, facts) of one state. Raises CheckpointError."""
    try:
        tensors = {name: load_file(path / f"{name}.safetensors") for name in FILES}
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"the training state {path} cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path / 'state.json'} is not a JSON object")
    return tensors, facts


def flatten_optimizer(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Optimizer states as named tensors: "member.parameter.key"."""
    return {
        f"{member}.{parameter}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for member, state in enumerate(states)
        for parameter, values in state["state"].items()
        for key, value in values.items()
    }


def unflatten_optimizer(tensors: Mapping[str, Tensor], states: list[dict[str, Any]]) -> None:
    """Put named tensors back into `states`, as `flatten_optimizer` took them."""
    for state in states:
        state["state"] = {}
    for name, value in tensors.items():
        try:
            member, parameter, key = name.split(".", 2)
            states[int(member)]["state"].setdefault(int(parameter), {})[key] = value
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{name!r} is not of this optimizer") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
