"""The choice of a memory mode from the plan, before a weight is read, and its refusals."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from neounify.attention import copied_tokens
from neounify.checkpoint.layers import LayerResidency
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import Residency, StreamResidency
from neounify.config import ModelConfig
from neounify.errors import MemoryPlanError, RequestError
from neounify.model.neo import NeoUnify
from neounify.runtime.devices import abilities
from neounify.runtime.memory_plan import (
    STREAMS,
    Mode,
    Resident,
    StreamName,
    Task,
    default_image,
    default_task,
    fitting_layers,
    least_prefill_rows,
    peak_bytes,
    weight_bytes,
    working_bytes,
)
from neounify.runtime.memory_rows import Kept, PlanRow, first_fit, machine_modes, plan_row
from neounify.runtime.rates import UNKNOWN, Machine, this_machine

log = logging.getLogger("neounify")
GB = 1e9


class Fitted(NamedTuple):
    """A mode, and with "layers" the layers of each stream that stay."""

    memory: Mode
    resident: Resident


class _Room(NamedTuple):
    """What a permitted mode may use, and its name for users."""

    machine: Machine
    name: str
    each: bool = False
    """Whether it is for each of two streams."""


def fit_memory(
    checkpoint: CheckpointFolder,
    kept: Kept,
    device: torch.device,
    memory: str,
    resident_layers: int | None = None,
    *,
    attention: str = "auto",
    ignore: bool = False,
) -> Fitted:
    """The mode to load weights in: `memory`, or with "auto" the first that fits.

    The plan is for `default_task`, with this backend of attention, in the memory that is free now.
    "layers" keeps `resident_layers` of each stream, None as many as fit. With `ignore`, nothing is
    refused.

    Raises MemoryPlanError where a mode, or with "auto" each of them, does not fit, RequestError for
    numbers of layers and devices that "layers" cannot serve.
    """
    machine = _machine(device, ignore=ignore)
    rooms = {mode: _Room(machine, mode) for mode in machine_modes(machine)}
    task = _task(checkpoint.config, attention)
    _check_asked(rooms, memory, resident_layers, checkpoint.config, device)
    return _chosen(rooms, checkpoint, kept, task, memory, resident_layers, ignore=ignore)


def fit_engines(
    checkpoint: CheckpointFolder,
    kept: Kept,
    device: torch.device,
    memory: str,
    resident_layers: int | None = None,
    *,
    role: StreamName | None = None,
    attention: str = "auto",
    ignore: bool = False,
) -> Fitted:
    """`fit_memory` for the engines of a server: of one stream, or with None of both at once.

    Then a stream may take half of the memory by layers, and both have as many resident layers.
    """
    if memory == "stream":
        raise RequestError("memory='stream' is not for a server; take all or layers")
    task, machine = _task(checkpoint.config, attention), _machine(device, ignore=ignore)
    # A process of one engine loads one stream, as the residency of streams does it.
    whole: Mode = "all" if role is None else "stream"
    if role == "und":
        task = replace(task, kind="chat")
    rooms = {whole: _Room(machine, "all")}
    if machine.by_layers:
        half = replace(machine, device=machine.device / 2)
        rooms["layers"] = _Room(half if role is None else machine, "layers", each=role is None)
    _check_asked(rooms, memory, resident_layers, checkpoint.config, device)
    fitted = _chosen(rooms, checkpoint, kept, task, memory, resident_layers, ignore=ignore)
    fewest = min(fitted.resident.values(), default=0)
    return Fitted(fitted.memory, dict.fromkeys(STREAMS, fewest))


def _task(config: ModelConfig, attention: str) -> Task:
    """`default_task`, by the rule of a backend of attention for copies of prefixes."""
    return replace(default_task(config), copied_tokens=copied_tokens(attention))


def _machine(device: torch.device, *, ignore: bool) -> Machine:
    """This machine. With `ignore` it has no memory where the system does not say how much."""
    try:
        return this_machine(device, UNKNOWN)
    except RequestError:
        if not ignore:
            raise
        here = abilities(device)
        unified, by_layers = here.unified, here.by_layers
        return Machine(device=0, host=0, rates=UNKNOWN, unified=unified, by_layers=by_layers)


def _check_asked(
    rooms: Mapping[Mode, _Room],
    memory: str,
    resident_layers: int | None,
    config: ModelConfig,
    device: torch.device,
) -> None:
    """Raise RequestError for numbers of layers, and for "layers" where no room is for it."""
    if resident_layers is not None:
        _check_count(resident_layers, config.num_layers)
    names = [room.name for room in rooms.values()]
    if memory == "layers" and "layers" not in names:
        raise RequestError(
            f"memory='layers' works on cpu and cuda, not on {device.type}; take "
            f"memory={names[-1]!r}",
            param="memory",
        )


def _chosen(
    rooms: Mapping[Mode, _Room],
    checkpoint: CheckpointFolder,
    kept: Kept,
    task: Task,
    memory: str,
    resident_layers: int | None,
    *,
    ignore: bool,
) -> Fitted:
    """The first mode that fits. Raises MemoryPlanError, or takes the last with `ignore`.

    Where a video fits in none, the modes are those for an image, with a warning.
    """
    config = checkpoint.config
    rows = []
    for mode, room in rooms.items():
        if memory in ("auto", room.name):
            resident = _resident(config, kept, task, room.machine, resident_layers)
            rows.append(plan_row(config, kept, task, room.machine, mode, resident))
    chosen = first_fit(rows)
    if chosen is None and task.kind == "t2v" and not ignore:
        image = replace(default_image(config), copied_tokens=task.copied_tokens)
        fitted = _chosen(rooms, checkpoint, kept, image, memory, resident_layers, ignore=False)
        log.warning(
            "%s: images fit in the memory that is free, but not a video of %d frames of %d×%d",
            checkpoint.path.name,
            task.frames,
            task.width,
            task.height,
        )
        return fitted
    if chosen is None and not ignore:
        none: Resident = dict.fromkeys(task.streams, 0)
        every = [
            plan_row(config, form, task, room.machine, mode, none)
            for form in (kept, _int8(checkpoint, kept))
            for mode, room in rooms.items()
        ]
        counted = resident_layers is not None
        raise MemoryPlanError(_refusal(rows, every, rooms, checkpoint.path.name, counted=counted))
    row = chosen or rows[-1]
    return Fitted(row.mode, row.resident)


def _resident(
    config: ModelConfig, kept: Kept, task: Task, machine: Machine, count: int | None
) -> Resident:
    """`count` layers of each stream; None as many as fit, 0 where not even that does."""
    if count is not None:
        return dict.fromkeys(task.streams, count)
    working = working_bytes(config, task, kept.itemsize, least_prefill_rows(task))
    most = fitting_layers(kept.weights, working, machine.device, unified=machine.unified)
    return most or dict.fromkeys(task.streams, 0)


def _check_count(resident_layers: int, count: int) -> None:
    if not 0 <= resident_layers <= count:
        raise RequestError(
            f"resident_layers must be from 0 to {count}, the layers of the model, got "
            f"{resident_layers}",
            param="resident_layers",
        )


def _int8(checkpoint: CheckpointFolder, kept: Kept) -> Kept:
    weights = weight_bytes(checkpoint.config, kept.itemsize, 8)
    return Kept(name="int8", weights=weights, itemsize=kept.itemsize)


def _refusal(
    rows: Sequence[PlanRow],
    every: Sequence[PlanRow],
    rooms: Mapping[Mode, _Room],
    name: str,
    *,
    counted: bool,
) -> str:
    """Why nothing of `rows` fits, and the first of `every` that does.

    `counted`: a number of resident layers was asked for, so that of what would fit is named.
    """

    def named(row: PlanRow) -> str:
        return _named(rooms[row.mode].name, row, counted=counted)

    least = min(rows, key=lambda row: row.peak)
    machine, _, each = rooms[least.mode]
    needs = f"{name} with {named(least)} peaks at {least.peak / GB:.1f} GB"
    have = f"{machine.device / GB:.1f} GB are free{' for each stream' if each else ''}"
    fitting = [row for row in every if row.fits]
    if not fitting:
        smallest = min(every, key=lambda row: row.peak)
        what = (
            f"nothing fits: {smallest.weights} weights with {named(smallest)} peak at "
            f"{smallest.peak / GB:.1f} GB"
        )
    else:
        best = fitting[0]
        form = "" if best.weights == rows[0].weights else f"{best.weights} weights and "
        what = f"{form}{named(best)} would fit, with a peak of {best.peak / GB:.1f} GB"
    return f"{needs}, and {have}; {what} (plan='ignore' tries nevertheless)"


def _named(memory: str, row: PlanRow, *, counted: bool) -> str:
    """The arguments of `load` for a row: its mode, and with `counted` its resident layers."""
    layers = min(row.resident.values(), default=0)
    count = f", resident_layers={layers}" if counted and row.mode == "layers" else ""
    return f"memory={memory!r}{count}"


def used_up(
    checkpoint: CheckpointFolder,
    kept: Kept,
    device: torch.device,
    memory: Mode,
    resident: Resident,
    error: Exception,
    *,
    attention: str = "auto",
) -> MemoryPlanError:
    """The error for memory that was used up while weights were read: the plan, and what is less.

    `resident`: the layers of each stream that were to stay.
    """
    config = checkpoint.config
    task, machine = _task(config, attention), _machine(device, ignore=True)
    none: Resident = dict.fromkeys(task.streams, 0)
    used = plan_row(config, kept, task, machine, memory, resident or none)
    rows = [
        plan_row(config, form, task, machine, mode, none)
        for form in (kept, _int8(checkpoint, kept))
        for mode in machine_modes(machine)
    ]
    counted = any(resident.values())
    advice = [
        f"{'' if row.weights == kept.name else 'int8 weights and '}"
        f"{_named(row.mode, row, counted=counted)} peaks at {row.peak / GB:.1f} GB"
        for row in rows
        if row.peak < used.peak
    ]
    reason = (str(error).splitlines() or ["out of memory"])[0]
    return MemoryPlanError(
        f"{checkpoint.path.name}: memory was used up while its weights were read ({reason}); by "
        f"the plan memory={memory!r} peaks at {used.peak / GB:.1f} GB, and {actual_peak(device)}; "
        + (", ".join(advice) or "nothing needs less: free memory, or take another device")
    )


def actual_peak(device: torch.device) -> str:
    """The peak of this process so far, in words."""
    if device.type in ("cuda", "xpu"):
        actual = torch.get_device_module(device).max_memory_reserved(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        actual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"the actual peak so far is {actual / GB:.1f} GB"


def peaks(
    model: NeoUnify,
    residency: Residency | None,
    kept: Kept | None = None,
    *,
    attention: str = "auto",
) -> str:
    """Predicted peak of a loaded model, for `default_task`, and the actual one so far.

    `kept`: its weights as they were loaded, None for plain ones in the dtype of the model.
    """
    itemsize = model.compute_dtype.itemsize
    mode: Mode = "all"
    resident: Resident = {}
    if isinstance(residency, LayerResidency):
        mode, resident = "layers", residency.resident
    elif isinstance(residency, StreamResidency):
        mode = "stream"
    task = _task(model.config, attention)
    predicted = peak_bytes(
        weight_bytes(model.config, itemsize) if kept is None else kept.weights,
        mode,
        working_bytes(model.config, task, itemsize),
        resident,
        unified=abilities(model.device).unified,
    )
    what = f"a video of {task.frames} frames of" if task.frames else "an image of"
    return (
        f"{what} {task.width}×{task.height} peaks at {predicted / GB:.1f} GB by the plan "
        f"of memory={mode!r}, {actual_peak(model.device)}"
    )
