"""Training state on disk: written aside and moved into place, so that a kill loses nothing.

A state is a folder `step-00001000` with safetensors files (weights, EMA, optimizer states, and
tensors of the method where it has any) and state.json with the rest, and size and SHA-256 of the
other files. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.checkpoint.names import current_name
from neounify.errors import CheckpointError
from neounify.files import atomic_folder, remove_leftovers, write_json
from neounify.train.method import MethodState

NAME = re.compile(r"step-(\d{8,})")
FILES = ("model", "ema", "optimizer")
METHOD_FILE = "method"
"""The tensors of the method, where it has any."""
REQUIRED = ("progress", "position", "ema_updates", "config")


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any]
) -> Path:
    """Write `tensors` (by file: model, ema, optimizer) and `facts` as the state of a step.

    Raises CheckpointError when the disk is full or not writable; earlier states stay.
    """
    target = folder / f"step-{step:08d}"
    try:
        remove_leftovers(folder, "step-*")
        with atomic_folder(target) as aside:
            for name in _present(tensors):
                stored = {k: v.contiguous() for k, v in tensors[name].items()}
                save_file(stored, aside / f"{name}.safetensors")
            facts = {**facts, "files": _fingerprints(aside)}
            write_json(aside / "state.json", facts, indent=1)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the training state {target} could not be saved: {error}; earlier ones are unchanged"
        ) from error
    return target


def _present(tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, ...]:
    """Names of the files that some tensors are saved as."""
    return (*FILES, METHOD_FILE) if tensors.get(METHOD_FILE) else FILES


def prune_states(folder: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` states up to `step`.

    Later ones are damaged states that a resume passed over; they are replaced when their step
    comes again, and must not count among the `keep`.
    """
    reached = [path for path in saved_states(folder) if _step(path) <= step]
    for path in reached[: -max(1, keep)]:
        shutil.rmtree(path, ignore_errors=True)


def saved_states(folder: Path) -> list[Path]:
    """The states of a folder, oldest first; not checked for damage."""
    if not folder.is_dir():
        return []
    states = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(states, key=_step)


def newest_whole_state(folder: Path, passed_over: Callable[[str], None]) -> Path | None:
    """The newest state that is not damaged; None when there are no states at all.

    `passed_over` is called with a line for each newer one that is. Raises CheckpointError when
    all are damaged.
    """
    states = saved_states(folder)
    damage = []
    for path in reversed(states):
        try:
            check_state(path)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        for line in damage:
            passed_over(f"passed over: {line}")
        return path
    if not states:
        return None
    raise CheckpointError(
        f"all {len(states)} states in {folder} are damaged, so there is none to resume from: "
        + "; ".join(damage)
    )


def check_state(path: Path) -> None:
    """Read a state without keeping it. Raises CheckpointError for a file that is cut off, missing
    or not what was written."""
    facts = _facts(path)
    recorded = facts.get("files")
    for name in _recorded(facts):
        file = path / f"{name}.safetensors"
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
            known = recorded.get(file.name) if isinstance(recorded, dict) else None
            # States of earlier versions hold no hashes: their headers must do.
            if known is not None and known != _fingerprint(file):
                raise CheckpointError(
                    f"the training state {path.name} is damaged: {file.name} is not as it was "
                    "written (its size or SHA-256 differs)"
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the training state {path.name} is damaged: {file.name} cannot be read ({error})"
            ) from error


def load_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, facts) of one state. Raises CheckpointError."""
    facts = _facts(path)
    try:
        files = {name: load_file(path / f"{name}.safetensors") for name in _recorded(facts)}
        return {n: _current_names(tensors) for n, tensors in files.items()}, _current_facts(facts)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"the training state {path} cannot be read: {error}") from error


def _current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {current_name(name): tensor for name, tensor in tensors.items()}


def _current_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts with the parameter names of this version."""
    members = facts.get("optimizer_parameters")
    if not isinstance(members, list):
        return facts
    names = [
        [current_name(n) if isinstance(n, str) else n for n in member]
        if isinstance(member, list)
        else member
        for member in members
    ]
    return {**facts, "optimizer_parameters": names}


def _facts(path: Path) -> dict[str, Any]:
    """state.json of a state."""
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the training state {path} cannot be read: state.json: {error}"
        ) from error
    if not isinstance(facts, dict) or (missing := [k for k in REQUIRED if k not in facts]):
        what = f"lacks {', '.join(missing)}" if isinstance(facts, dict) else "is no JSON object"
        raise CheckpointError(f"the training state {path} cannot be read: state.json {what}")
    return facts


def _recorded(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the tensor files that a state has."""
    files = facts.get("files")
    has_method = isinstance(files, dict) and f"{METHOD_FILE}.safetensors" in files
    return (*FILES, METHOD_FILE) if has_method else FILES


def method_state(
    path: Path, kind: str, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
) -> MethodState:
    """The part of a loaded state that belongs to its method.

    States of earlier versions are of supervised training. Raises CheckpointError for a state of
    another method than `kind`.
    """
    record = facts.get("method", {"kind": "supervised", "facts": {}})
    if not isinstance(record, dict) or not isinstance(record.get("facts"), dict):
        raise CheckpointError(f"the training state {path} is damaged: method is {record!r:.80}")
    if record.get("kind") != kind:
        raise CheckpointError(
            f"{path} is a state of the method {record.get('kind')!r:.80}, the stage has {kind!r}: "
            "give method.kind the value it had, or start a new run"
        )
    return MethodState(tensors=tensors.get(METHOD_FILE, {}), facts=record["facts"])


def _fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every tensor file of a state."""
    return {file.name: _fingerprint(file) for file in sorted(folder.glob("*.safetensors"))}


def _fingerprint(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def flatten_optimizer(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Optimizer states as named tensors: "member.parameter.key"."""
    return {
        f"{member}.{parameter}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for member, state in enumerate(states)
        for parameter, values in state["state"].items()
        for key, value in values.items()
    }


def unflatten_optimizer(tensors: Mapping[str, Tensor]) -> list[dict[int, dict[str, Tensor]]]:
    """The inverse of `flatten_optimizer`: for each member, by number of the parameter and key."""
    members: dict[int, dict[int, dict[str, Tensor]]] = {}
    for name, value in tensors.items():
        try:
            member, parameter, key = name.split(".", 2)
            members.setdefault(int(member), {}).setdefault(int(parameter), {})[key] = value
        except ValueError as error:
            raise CheckpointError(f"{name!r} is not of an optimizer's state") from error
    return [members.get(member, {}) for member in range(max(members, default=-1) + 1)]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
