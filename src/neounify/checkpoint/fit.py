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
from neounify.errors import MemoryPlanError, RequestError
from neounify.model.neo import NeoUnify
from neounify.runtime.memory_plan import (
    MODES,
    Mode,
    Resident,
    StreamName,
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
    share: float = 1.0,
    streams: Sequence[StreamName] = (),
) -> Fitted:
    """The mode to load weights in: `memory`, or with "auto" the first that fits.

    The plan is for one image of the checkpoint's default size, in the memory that is free now.
    "layers" keeps `resident_layers` of each stream, None as many as fit. With `ignore`, nothing is
    refused. `share`: the part of the memory that a stream may take by layers where several work at
    once. `streams`: those that are loaded here, by default both.

    Raises MemoryPlanError where a mode, or with "auto" each of them, does not fit, RequestError for
    numbers of layers and devices that "layers" cannot serve.
    """
    config = checkpoint.config
    task = default_task(config)
    machine = this_machine(device, UNKNOWN)
    limited = replace(machine, device=machine.device * share)
    if resident_layers is not None:
        _check_count(resident_layers, config.num_layers)
    working = working_bytes(config, task, kept.itemsize, least_prefill_rows(task))
    working = {name: a for name, a in working.items() if not streams or name in streams}
    most = fitting_layers(kept.weights, working, limited.device, unified=machine.unified)
    none: dict[StreamName, int] = dict.fromkeys(working, 0)
    resident: Resident = most or none
    if resident_layers is not None:
        resident = dict.fromkeys(working, resident_layers)
    tried: tuple[Mode, ...] = MODES
    if memory != "auto":
        tried = tuple(mode for mode in MODES if mode == memory)
    rows = [
        plan_row(config, kept, task, limited if mode == "layers" else machine, mode, resident)
        for mode in tried
        if mode != "layers" or device.type in LAYER_DEVICES
    ]
    if not rows:
        raise RequestError(
            f"memory='layers' works on {' and '.join(LAYER_DEVICES)}, not on {device.type}",
            param="memory",
        )
    chosen = first_fit(rows)
    if chosen is None and not ignore:
        every = plan_rows(config, [kept, _int8(checkpoint, kept)], task, machine)
        raise MemoryPlanError(_refusal(rows, every, machine, checkpoint.path.name))
    row = chosen or rows[-1]
    return Fitted(row.mode, row.resident)


LAYER_DEVICES = ("cpu", "cuda")


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
    if model.device.type == "cuda":
        actual = torch.cuda.max_memory_reserved(model.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        actual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (
        f"an image of {task.width}×{task.height} peaks at {predicted / GB:.1f} GB by the plan "
        f"of memory={mode!r}, the actual peak so far is {actual / GB:.1f} GB"
    )
