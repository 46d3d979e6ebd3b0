"""The choice of a memory mode from the plan, before a weight is read, and its refusals."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from neounify.checkpoint.layers import LayerResidency
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import Residency, StreamResidency
from neounify.config import ModelConfig
from neounify.errors import MemoryPlanError, RequestError
from neounify.model.neo import NeoUnify
from neounify.runtime.devices import abilities
from neounify.runtime.memory_plan import (
    MODES,
    STREAMS,
    Mode,
    Resident,
    StreamName,
    Task,
    default_task,
    fitting_layers,
    least_prefill_rows,
    peak_bytes,
    weight_bytes,
    working_bytes,
)
from neounify.runtime.memory_rows import Kept, PlanRow, first_fit, plan_row, plan_rows
from neounify.runtime.rates import UNKNOWN, Machine, this_machine

GB = 1e9


class Fitted(NamedTuple):
    """A mode, and with "layers" the layers of each stream that stay."""

    memory: Mode
    resident: Resident


def fit_memory(
    checkpoint: CheckpointFolder,
    kept: Kept,
    device: torch.device,
    memory: str,
    resident_layers: int | None = None,
    *,
    ignore: bool = False,
) -> Fitted:
    """The mode to load weights in: `memory`, or with "auto" the first that fits.

    The plan is for one image of the checkpoint's default size, in the memory that is free now.
    "layers" keeps `resident_layers` of each stream, None as many as fit. With `ignore`, nothing is
    refused.

    Raises MemoryPlanError where a mode, or with "auto" each of them, does not fit, RequestError for
    numbers of layers and devices that "layers" cannot serve.
    """
    modes = MODES if memory == "auto" else tuple(mode for mode in MODES if mode == memory)
    task, machine = default_task(checkpoint.config), this_machine(device, UNKNOWN)
    rows = _rows(checkpoint.config, kept, task, machine, modes, resident_layers, device)
    return _chosen(rows, checkpoint, kept, task, machine, ignore=ignore)


def fit_engines(
    checkpoint: CheckpointFolder,
    kept: Kept,
    device: torch.device,
    memory: str,
    resident_layers: int | None = None,
    *,
    role: StreamName | None = None,
    ignore: bool = False,
) -> Fitted:
    """`fit_memory` for the engines of a server: of one stream, or with None of both at once.

    Then a stream may take half of the memory by layers, and both have as many resident layers.
    """
    config = checkpoint.config
    task, machine = default_task(config), this_machine(device, UNKNOWN)
    # A process of one engine loads one stream, as the residency of streams does it.
    whole: Mode = "all" if role is None else "stream"
    if role == "und":
        task = replace(task, kind="chat")
    asked = whole if memory == "all" else memory
    modes: tuple[Mode, ...] = tuple(mode for mode in (whole, "layers") if asked in ("auto", mode))
    if memory == "stream" or not modes:
        raise RequestError(f"memory={memory!r} is not for a server; take all or layers")
    rows = _rows(config, kept, task, machine, modes[:1], resident_layers, device)
    if "layers" in modes:
        half = replace(machine, device=machine.device / 2) if role is None else machine
        rows = [row for row in rows if row.mode != "layers"]
        rows += _rows(config, kept, task, half, ("layers",), resident_layers, device)
    fitted = _chosen(rows, checkpoint, kept, task, machine, ignore=ignore)
    fewest = min(fitted.resident.values(), default=0)
    return Fitted(fitted.memory, dict.fromkeys(STREAMS, fewest))


def _rows(
    config: ModelConfig,
    kept: Kept,
    task: Task,
    machine: Machine,
    modes: Sequence[Mode],
    resident_layers: int | None,
    device: torch.device,
) -> list[PlanRow]:
    """Rows of the modes that a device serves. Raises RequestError."""
    if resident_layers is not None:
        _check_count(resident_layers, config.num_layers)
    by_layers = abilities(device).by_layers
    if tuple(modes) == ("layers",) and not by_layers:
        raise RequestError(
            f"memory='layers' works on cpu and cuda, not on {device.type}; take memory='stream'",
            param="memory",
        )
    resident: Resident = dict.fromkeys(task.streams, resident_layers or 0)
    if resident_layers is None:
        working = working_bytes(config, task, kept.itemsize, least_prefill_rows(task))
        device_bytes, unified = machine.device, machine.unified
        most = fitting_layers(kept.weights, working, device_bytes, unified=unified)
        resident = most or resident
    return [
        plan_row(config, kept, task, machine, mode, resident)
        for mode in modes
        if mode != "layers" or by_layers
    ]


def _chosen(
    rows: Sequence[PlanRow],
    checkpoint: CheckpointFolder,
    kept: Kept,
    task: Task,
    machine: Machine,
    *,
    ignore: bool,
) -> Fitted:
    """The first row that fits. Raises MemoryPlanError, or takes the last with `ignore`."""
    chosen = first_fit(rows)
    if chosen is None and not ignore:
        every = plan_rows(checkpoint.config, [kept, _int8(checkpoint, kept)], task, machine)
        raise MemoryPlanError(_refusal(rows, every, machine, checkpoint.path.name))
    row = chosen or rows[-1]
    return Fitted(row.mode, row.resident)


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


def _refusal(rows: Sequence[PlanRow], every: Sequence[PlanRow], machine: Machine, name: str) -> str:
    """Why nothing of `rows` fits, and the first of `every` that does."""
    least = min(rows, key=lambda row: row.peak)
    needs = f"{name} with memory={least.mode!r} peaks at {least.peak / GB:.1f} GB"
    have = f"{machine.device / GB:.1f} GB are free"
    fitting = [row for row in every if row.fits]
    if not fitting:
        smallest = min(every, key=lambda row: row.peak)
        what = (
            f"nothing fits: {smallest.weights} weights with memory={smallest.mode!r} peak at "
            f"{smallest.peak / GB:.1f} GB"
        )
    else:
        best = fitting[0]
        form = "" if best.weights == rows[0].weights else f"{best.weights} weights and "
        what = f"{form}memory={best.mode!r} would fit, with a peak of {best.peak / GB:.1f} GB"
    return f"{needs}, and {have}; {what} (plan='ignore' tries nevertheless)"


def used_up(
    checkpoint: CheckpointFolder, kept: Kept, device: torch.device, memory: str, error: Exception
) -> MemoryPlanError:
    """The error for memory that was used up while weights were read: the plan, and what is less."""
    task, machine = default_task(checkpoint.config), this_machine(device, UNKNOWN)
    none: Resident = dict.fromkeys(task.streams, 0)
    forms = [kept, _int8(checkpoint, kept)]
    rows = [
        plan_row(checkpoint.config, form, task, machine, mode, none)
        for form in forms
        for mode in MODES
        if mode != "layers" or abilities(device).by_layers
    ]
    used = next(row for row in rows if row.mode == memory)
    less = [row for row in rows if row.peak < used.peak]
    advice = [
        f"{'' if row.weights == kept.name else 'int8 weights and '}memory={row.mode!r} "
        f"peaks at {row.peak / GB:.1f} GB"
        for row in less
    ]
    reason = (str(error).splitlines() or ["out of memory"])[0]
    return MemoryPlanError(
        f"{checkpoint.path.name}: memory was used up while its weights were read ({reason}); by "
        f"the plan memory={memory!r} peaks at {used.peak / GB:.1f} GB, and {actual_peak(device)}; "
        + (", ".join(advice) or "nothing needs less: free memory, or take another device")
    )


def actual_peak(device: torch.device) -> str:
    """The peak of this process so far, in words."""
    if device.type == "cuda":
        actual = torch.cuda.max_memory_reserved(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        actual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"the actual peak so far is {actual / GB:.1f} GB"


def peaks(model: NeoUnify, residency: Residency | None) -> str:
    """Predicted peak of a loaded model, for an image of default size, and the actual one so far."""
    itemsize = model.compute_dtype.itemsize
    mode: Mode = "all"
    resident: Resident = {}
    if isinstance(residency, LayerResidency):
        mode, resident = "layers", residency.resident
    elif isinstance(residency, StreamResidency):
        mode = "stream"
    task = default_task(model.config)
    predicted = peak_bytes(
        weight_bytes(model.config, itemsize),
        mode,
        working_bytes(model.config, task, itemsize),
        resident,
        unified=model.device.type == "cpu",
    )
    return (
        f"an image of {task.width}×{task.height} peaks at {predicted / GB:.1f} GB by the plan "
        f"of memory={mode!r}, {actual_peak(model.device)}"
    )
