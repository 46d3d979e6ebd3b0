"""Training state on disk: written aside and moved into place, so that a kill loses nothing.

A state is a folder `step-00001000` with safetensors files (weights, EMA, optimizer states, and
tensors of the method where it has any) and state.json with the rest, and size and SHA-256 of the
other files. One rank writes one file of each, model.safetensors; on many, each rank writes what it
holds into a folder, model/, by torch's distributed checkpoints (DCP). Either is read by any number
of ranks. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint.config_json import read_config, write_config
from neounify.checkpoint.names import current_name
from neounify.config import ModelConfig
from neounify.distributed.ranks import ONE, OtherRankError, Ranks
from neounify.distributed.states import (
    StoredTensors,
    files_of,
    load_sharded,
    read_like,
    save_sharded,
)
from neounify.errors import CheckpointError, ConfigError, NeounifyError
from neounify.files import ASIDE_SUFFIX, atomic_folder, remove_folder, remove_leftovers, write_json
from neounify.train.method import MethodState

NAME = re.compile(r"step-(\d{8,})")
TENSOR_FILE = re.compile(r"\w+(/[\w-]+)?\.safetensors")
NUMBERED = re.compile(r"\d+\.\d+")
FILES = ("model", "ema", "optimizer")
METHOD_FILE = "method"
"""The tensors of the method, where it has any."""
REQUIRED = ("progress", "position", "ema_updates", "config")


def save_state(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: dict[str, Any],
    ranks: Ranks = ONE,
) -> Path:
    """Write `tensors` (by file: model, ema, optimizer) and `facts` as the state of a step.

    Collective; `facts` are those of rank 0. Raises CheckpointError when the disk is full or not
    writable; earlier states stay.
    """
    target = folder / f"step-{step:08d}"
    try:
        with _aside(folder, target, ranks) as aside:
            written = ranks.together(lambda: _write(aside, tensors, ranks))
            files = {name: one for part in ranks.gather(written) for name, one in part.items()}
            if ranks.first:
                saved = 1 + int(max((_saved(path, 0) for path in saved_states(folder)), default=0))
                record = {"saved": saved, "launch": ranks.launch, "files": files}
                write_json(aside / "state.json", {**facts, **record}, indent=1)
    except OtherRankError:
        raise
    except (OSError, SafetensorError, NeounifyError) as error:
        raise CheckpointError(
            f"the training state {target} could not be saved: {error}; earlier ones are unchanged"
        ) from error
    ranks.wait()
    return target


@contextmanager
def _aside(folder: Path, target: Path, ranks: Ranks) -> Iterator[Path]:
    """The folder that all ranks write into, which rank 0 makes and moves into its place."""
    if not ranks.first:
        yield Path(ranks.gather("")[0])
        return
    with ExitStack() as stack:

        def begin() -> Path:
            remove_leftovers(folder, "step-*")
            return stack.enter_context(atomic_folder(target))

        if ranks.size == 1:
            yield begin()
            return
        aside = begin()
        ranks.gather(str(aside))
        yield aside


def _write(
    aside: Path, tensors: Mapping[str, Mapping[str, Tensor]], ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """Write the tensors that this rank holds; the fingerprints of its files by name."""
    for part in _present(tensors):
        stored = {name: tensor.contiguous() for name, tensor in tensors[part].items()}
        if ranks.size == 1:
            save_file(stored, aside / f"{part}.safetensors")
        elif stored:
            save_sharded(stored, aside / part, ranks)
    files = sorted(aside.glob("*.safetensors" if ranks.size == 1 else f"*/{files_of(ranks.rank)}"))
    return {file.relative_to(aside).as_posix(): _fingerprint(file) for file in files}


def _present(tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, ...]:
    """Names of the files that some tensors are saved as."""
    return (*FILES, METHOD_FILE) if tensors.get(METHOD_FILE) else FILES


def prune_states(folder: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` states up to `step`.

    The newest are those saved last. States of later steps are damaged ones that a resume passed
    over, or of before a resume from an earlier one; they are replaced when their step comes again,
    and must not count among the `keep`.
    """
    reached = [path for path in saved_states(folder) if _step(path) <= step]
    for path in sorted(reached, key=lambda one: _saved(one, -1))[: -max(1, keep)]:
        with suppress(OSError):
            remove_folder(path)


def saved_states(folder: Path) -> list[Path]:
    """The states of a folder by their steps; not checked for damage."""
    if not folder.is_dir():
        return []
    states = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(states, key=_step)


def newest_whole_state(folder: Path, passed_over: Callable[[str], None]) -> Path | None:
    """The state saved last that is not damaged; None when there are no states at all.

    A run that resumed from an earlier state has saved states of lower steps after those of higher
    ones. `passed_over` is called with a line for each newer one that is damaged, or that was cut
    off while it was written. Raises CheckpointError when all are damaged.
    """
    states = saved_states(folder)
    for line in _cut_off(folder, states[-1] if states else None):
        passed_over(line)
    newest, damage = _newest_whole(states)
    if newest is not None or not states:
        for line in damage:
            passed_over(f"passed over: {line}")
        return newest
    raise CheckpointError(
        f"all {len(states)} states in {folder} are damaged, so there is none to resume from: "
        + "; ".join(damage)
    )


def newest_of_launch(folder: Path, launch: str, passed_over: Callable[[str], None]) -> Path | None:
    """The state that one launch (see `Ranks.launch`) saved last and that is not damaged, if any.

    `passed_over` is called with a line for each newer one that is damaged.
    """
    states = [path for path in saved_states(folder) if launch and _launch(path) == launch]
    newest, damage = _newest_whole(states)
    for line in damage:
        passed_over(f"passed over: {line}")
    return newest


def _newest_whole(states: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The state saved last that is whole, and what is wrong with newer ones."""
    damage = []
    for path in sorted(states, key=lambda one: _saved(one, math.inf))[::-1]:
        try:
            check_state(path)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        return path, damage
    return None, damage


def _cut_off(folder: Path, newest: Path | None) -> list[str]:
    """A line for each state after the newest whose writing was cut off."""
    started = {path.name[1:].partition(".")[0] for path in folder.glob(f".step-*{ASIDE_SUFFIX}")}
    after = -1 if newest is None else _step(newest)
    return [
        f"passed over: the state {name} was cut off while it was written"
        for name in sorted(started)
        if NAME.fullmatch(name) and int(name.removeprefix("step-")) > after
    ]


def check_state(path: Path) -> None:
    """Read a state without keeping it. Raises CheckpointError for a file that is cut off, missing
    or not what was written."""
    facts = _facts(path)
    for name, known in _recorded(facts).items():
        try:
            with safe_open(path / name, "pt") as opened:
                opened.keys()
            # States of earlier versions hold no hashes: their headers must do.
            if known is not None and known != _fingerprint(path / name):
                raise CheckpointError(
                    f"the training state {path.name} is damaged: {name} is not as it was "
                    "written (its size or SHA-256 differs)"
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the training state {path.name} is damaged: {name} cannot be read ({error})"
            ) from error


def load_state(
    path: Path,
    like: Mapping[str, Mapping[str, Tensor]] | None = None,
    parts: Collection[str] = (*FILES, METHOD_FILE),
    ranks: Ranks = ONE,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, facts) of one state, of some `parts` of it; collective.

    A tensor that `like` holds, by file and name, is cut over the ranks as that one is, and read by
    the rank's own slice. Raises CheckpointError, where one rank fails on all (`Ranks.together`).
    """
    facts = ranks.together(lambda: _facts_of_whole(path))
    ranks.check_alike(f"state.json of {path}", json.dumps(facts))
    names = {name.partition("/")[0].removesuffix(".safetensors") for name in _recorded(facts)}
    wanted = sorted(names & set(parts))
    try:
        files = {name: _read(path, name, (like or {}).get(name, {}), ranks) for name in wanted}
        return files, _current_facts(facts)
    except OtherRankError:
        raise
    except (OSError, SafetensorError, ValueError, NeounifyError) as error:
        raise CheckpointError(f"the training state {path} cannot be read: {error}") from error


def open_state(
    path: Path, parts: Collection[str]
) -> tuple[dict[str, StoredTensors], dict[str, Any]]:
    """(some parts of a state, facts), without reading tensors. Raises CheckpointError."""
    facts = _facts_of_whole(path)
    folders = {name: path / name for name in parts}
    try:
        return {
            name: StoredTensors(at if at.is_dir() else path / f"{name}.safetensors")
            for name, at in folders.items()
        }, facts
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"the training state {path} cannot be read: {error}") from error


def _read(path: Path, part: str, like: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    if ranks.together((path / part).is_dir):
        return load_sharded(path / part, like, ranks)

    def read() -> dict[str, Tensor]:
        stored = StoredTensors(path / f"{part}.safetensors")
        names = {current_name(name): name for name in stored.shapes}
        return {now: read_like(stored, name, like.get(now)) for now, name in names.items()}

    return ranks.together(read)


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
    if not (path / "state.json").is_file():
        raise CheckpointError(
            f"{path} is not a training state: it holds no state.json; name a folder such as "
            "out/NAME/states/step-00000100, or auto"
        )
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


def _facts_of_whole(path: Path) -> dict[str, Any]:
    """state.json of a state whose other files are there. Raises CheckpointError."""
    facts = _facts(path)
    if missing := [name for name in _recorded(facts) if not (path / name).is_file()]:
        raise CheckpointError(f"the training state {path} lacks {', '.join(missing[:3])}")
    return facts


def _recorded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The tensor files of a state, and the fingerprints they had, which earlier states lack."""
    files = facts.get("files")
    if isinstance(files, dict) and files:
        if strange := [name for name in files if not TENSOR_FILE.fullmatch(name)]:
            raise CheckpointError(f"a training state is damaged: its file {strange[0]!r:.80}")
        return dict(files)
    return {f"{name}.safetensors": None for name in FILES}


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


def config_of(state: Path, facts: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """The config of a run with the sampling defaults of its state, which stages may have changed.

    Raises CheckpointError for the state of another model.
    """
    saved = facts.get("config")
    try:
        adopted = config.replace(sampling=read_config(saved).sampling)  # type: ignore[arg-type]
    except (ConfigError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state} is damaged: its config: {error}") from error
    if saved != json.loads(json.dumps(write_config(adopted))):
        raise CheckpointError(f"{state} is the state of another model than the recipe's")
    return adopted


def _fingerprint(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def flatten_optimizer(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Optimizer states by parameter as named tensors: "parameter.key"."""
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, state in states.items()
        for key, value in state.items()
    }


def unflatten_optimizer(
    tensors: Mapping[str, Tensor], names: Sequence[Sequence[str]]
) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flatten_optimizer`. Raises CheckpointError.

    In states of earlier versions the tensors were "member.number.key", of `names[member][number]`.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if NUMBERED.fullmatch(name):
            member, number = map(int, name.split("."))
            try:
                name = names[member][number]
            except IndexError as error:
                raise CheckpointError(
                    "the state is of another optimizer or other parameters"
                ) from error
        states.setdefault(name, {})[key] = value
    return states


def _saved(path: Path, damaged: float) -> float:
    """The number of a save among those into its folder; `damaged` where it cannot be read.

    States of earlier versions have none: 0.
    """
    try:
        number = _facts(path).get("saved")
    except CheckpointError:
        return damaged
    return number if isinstance(number, int) else 0


def _launch(path: Path) -> object:
    """The launch that saved a state, where that can be read."""
    try:
        return _facts(path).get("launch")
    except CheckpointError:
        return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
