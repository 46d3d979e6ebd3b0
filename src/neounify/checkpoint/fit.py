"""The choice of a memory mode from the plan, before a weight is read, and its refusals."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
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
    peak_bytes,
    weight_bytes,
    working_bytes,
)
from neounify.runtime.memory_rows import (
    Fitted,
    Kept,
    PlanRow,
    first_fit,
    fitting_layers,
    machine_modes,
    nearest,
    plan_row,
)
from neounify.runtime.plan import ExecutionPlan
from neounify.runtime.rates import UNKNOWN, Machine, process_bytes, this_machine

log = logging.getLogger("neounify")
GB = 1e9


class _Room(NamedTuple):
    """What a permitted mode may use, its name for users, and for what alone or beside what."""

    machine: Machine
    name: str
    note: str = ""


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


def fit_two(
    checkpoints: Sequence[CheckpointFolder], kept: Sequence[Kept], device: torch.device
) -> tuple[Fitted, Fitted]:
    """The modes of two models that are there at once, to compare images of default size.

    The first mode of the first one that leaves room for the second, of which as many layers stay as
    fit. Raises MemoryPlanError where none does.
    """
    machine = _machine(device, ignore=False)
    tasks = [_task(checkpoint.config, "auto", default_image) for checkpoint in checkpoints]

    def chosen(number: int, rooms: Mapping[Mode, _Room], layers: int | None) -> Fitted:
        of = (checkpoints[number], kept[number], tasks[number])
        return _chosen(rooms, *of, "auto", layers, ignore=False)

    for mode in machine_modes(machine):
        try:
            first = chosen(0, {mode: _Room(machine, mode)}, 0)
            left = replace(machine, device=machine.device - (first.peak or 0), process=0)
            beside = {m: _Room(left, m, " beside the first") for m in machine_modes(left)}
            return first, chosen(1, beside, None)
        except MemoryPlanError as error:
            refused = error
    names = " and ".join(checkpoint.path.name for checkpoint in checkpoints)
    raise MemoryPlanError(f"{names} do not fit at once: {refused}")


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
    task = replace(task, stream=role)
    rooms = {whole: _Room(machine, "all")}
    if machine.by_layers:
        half = replace(machine, device=machine.device / 2)
        each = " for each stream" if role is None else ""
        rooms["layers"] = _Room(half if role is None else machine, "layers", each)
    _check_asked(rooms, memory, resident_layers, checkpoint.config, device)
    fitted = _chosen(rooms, checkpoint, kept, task, memory, resident_layers, ignore=ignore)
    fewest = min(fitted.resident.values(), default=0)
    return fitted._replace(resident=dict.fromkeys(STREAMS, fewest))


def _task(
    config: ModelConfig, attention: str, default: Callable[[ModelConfig], Task] = default_task
) -> Task:
    """A default task, by the rule of a backend of attention for copies of prefixes."""
    return replace(default(config), copied_tokens=copied_tokens(attention))


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
        image = replace(default_image(config), copied_tokens=task.copied_tokens, stream=task.stream)
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
    return Fitted(row.mode, row.resident, row.peak)


def _resident(
    config: ModelConfig, kept: Kept, task: Task, machine: Machine, count: int | None
) -> Resident:
    """`count` layers of each stream; None as many as fit, 0 where not even that does."""
    if count is not None:
        return dict.fromkeys(task.streams, count)
    return fitting_layers(config, kept, task, machine) or dict.fromkeys(task.streams, 0)


def _check_count(resident_layers: int, count: int) -> None:
    if not 0 <= resident_layers <= count:
        raise RequestError(
            f"resident_layers must be from 0 to {count}, the layers of the model, got "
            f"{resident_layers}",
            param="resident_layers",
        )


def _int8(checkpoint: CheckpointFolder, kept: Kept) -> Kept:
    weights = weight_bytes(checkpoint.config, kept.itemsize, 8)
    weights = replace(weights, adapters=kept.weights.adapters)
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

    least = nearest(rows)
    machine, _, note = rooms[least.mode]
    needs = f"{name} with {named(least)} peaks at {least.peak / GB:.1f} GB"
    have = f"{machine.device / GB:.1f} GB are free{note}"
    if least.only_locks:
        needs = f"{name} with {named(least)} locks {least.locked / GB:.1f} GB of the host's memory"
        have = f"{machine.host / GB:.1f} GB of it are free"
    fitting = [row for row in every if row.fits]
    if not fitting:
        smallest = nearest(every)
        size, verb = smallest.peak, "peak at"
        if smallest.only_locks:
            size, verb = smallest.locked, "lock"
        what = (
            f"nothing fits: {smallest.weights} weights with {named(smallest)} {verb} "
            f"{size / GB:.1f} GB"
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
    fitted: Fitted,
    error: Exception,
    *,
    attention: str = "auto",
) -> MemoryPlanError:
    """The error for memory that was used up while weights were read: the plan, and what is less."""
    config, (memory, resident, peak) = checkpoint.config, fitted
    task, machine = _task(config, attention), _machine(device, ignore=True)
    none: Resident = dict.fromkeys(task.streams, 0)
    if peak is None:
        peak = plan_row(config, kept, task, machine, memory, resident or none).peak
    machine = replace(machine, device=peak)
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
        if row.peak < peak
    ]
    reason = (str(error).splitlines() or ["out of memory"])[0]
    return MemoryPlanError(
        f"{checkpoint.path.name}: memory was used up while its weights were read ({reason}); by "
        f"the plan memory={memory!r} peaks at {peak / GB:.1f} GB, and {actual_peak(device)}; "
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
    plan: ExecutionPlan,
    kept: Kept | None = None,
) -> str:
    """Predicted peak of a loaded model, for `default_task`, and the actual one so far.

    `plan` has the limits of its calls. `kept`: its weights as they were loaded, None for plain ones
    in the dtype of the model.
    """
    itemsize = model.compute_dtype.itemsize
    mode: Mode = "all"
    resident: Resident = {}
    if isinstance(residency, LayerResidency):
        mode, resident = "layers", residency.resident
    elif isinstance(residency, StreamResidency):
        mode = "stream"
    task = _task(model.config, plan.attention)
    predicted = peak_bytes(
        weight_bytes(model.config, itemsize) if kept is None else kept.weights,
        mode,
        working_bytes(model.config, task, itemsize, plan.prefill_rows, plan.branch_rows),
        resident,
        unified=abilities(model.device).unified,
        process=process_bytes(),
    )
    what = f"a video of {task.frames} frames of" if task.frames else "an image of"
    return (
        f"{what} {task.width}×{task.height} peaks at {predicted / GB:.1f} GB by the plan "
        f"of memory={mode!r}, {actual_peak(model.device)}"
    )
