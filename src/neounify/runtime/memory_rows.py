"""Rows of a memory plan: every mode with its peak and its times, and the first that fits.

A step takes max(F/φ, S/β): F operations at the sustained rate φ, S streamed bytes at the rate of
copies β, or at the disk's where the page cache cannot hold the stream that is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from neounify.config import ModelConfig
from neounify.runtime.memory_plan import (
    MODES,
    PREFILL_ROWS,
    STREAMS,
    Mode,
    Resident,
    StreamName,
    Task,
    WeightBytes,
    fitting_layers,
    layer_unit,
    least_prefill_rows,
    peak_bytes,
    resident_layers,
    rest_units,
    working_bytes,
)
from neounify.runtime.plan import UNLIMITED, fitting_branch_rows
from neounify.runtime.rates import Machine

TEXT_SHARE = 0.7
"""Share of a device's bandwidth that decoding reaches."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Weights in one form: its name, bytes as kept, bytes that files hold of each stream's layers.

    `itemsize` is that of activations.
    """

    name: str
    weights: WeightBytes
    itemsize: int
    stored: Mapping[StreamName, float] | None = None

    def read(self, stream: StreamName) -> float:
        """Bytes of files read to stream all layers of one stream."""
        return self.weights.stream(stream) if self.stored is None else self.stored[stream]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One form of the weights in one mode, in bytes and seconds.

    `resident`: layers of each stream that stay. `text` is tokens a second. Times are None where
    the row does not fit, `step` and `image` also where no image is asked for.
    """

    weights: str
    mode: Mode
    resident: Resident
    peak: float
    locked: float
    streamed: float
    fits: bool
    step: float | None = None
    image: float | None = None
    text: float | None = None


# --- times ---


def passed_parameters(config: ModelConfig, stream: StreamName) -> int:
    """P: parameters a row of a stream passes; of experts, those it is routed to."""
    return sum(_passed(config, stream, n) for n in range(config.num_layers))


def _passed(config: ModelConfig, stream: StreamName, number: int) -> int:
    unit, mlp = layer_unit(config, stream, number), config.mlps[stream]
    whole = unit.codes + unit.rest
    if not mlp.is_sparse(number):
        return whole
    idle = mlp.num_experts - mlp.experts_per_token
    return whole - idle * 3 * mlp.expert_width * config.hidden_size


def step_operations(config: ModelConfig, task: Task) -> float:
    """F of a denoising step: 2 · P · R + 4 · b · n · (n + prefix) · Q · L."""
    n, runs = task.tokens(config), task.branches * task.jobs
    parameters = passed_parameters(config, "gen") + rest_units(config)["gen"].rest
    pairs = n * (n + task.prefix)
    queries = config.num_heads * config.head_dim
    return runs * (2.0 * parameters * n + 4.0 * pairs * queries * config.num_layers)


def prefill_operations(config: ModelConfig, task: Task) -> float:
    """F of the prompts of all branches, every token attending to half of the others."""
    branches = task.branches if task.paints else 1
    n = task.prefix - task.think
    queries = config.num_heads * config.head_dim
    pairs = 2.0 * n * n * queries * config.num_layers
    return branches * (2.0 * passed_parameters(config, "und") * n + pairs)


def decoded_bytes(config: ModelConfig, weights: WeightBytes) -> float:
    """Bytes of weights that one decoded token reads: its experts, and the text head."""
    return weights.lm_head + sum(_of_token(config, weights))


def _of_token(config: ModelConfig, weights: WeightBytes) -> list[float]:
    """Bytes of each layer that one decoded token reads."""
    units = [layer_unit(config, "und", number) for number in range(config.num_layers)]
    return [
        size * _passed(config, "und", number) / (unit.codes + unit.rest)
        for number, (unit, size) in enumerate(zip(units, weights.layers["und"], strict=True))
    ]


# --- rows ---


def plan_row(
    config: ModelConfig, kept: Kept, task: Task, machine: Machine, mode: Mode, resident: Resident
) -> PlanRow:
    """The row of one mode; `resident` counts with "layers" only."""
    weights = kept.weights
    idle = dict.fromkeys(task.streams, 0.0)
    free = machine.device - peak_bytes(weights, mode, idle, resident, unified=machine.unified)
    together = UNLIMITED
    if free > 0:
        together = fitting_branch_rows(config, kept.itemsize, int(free))
    # Prompts that do not fit in one call are cut, down to the size of an image.
    for limit in (PREFILL_ROWS, least_prefill_rows(task)):
        working = working_bytes(config, task, kept.itemsize, limit, together)
        peak = peak_bytes(weights, mode, working, resident, unified=machine.unified)
        if peak <= machine.device:
            break
    buffers = mode != "all" and not machine.unified
    locked = max(weights.locked(name) for name in task.streams) if buffers else 0.0
    row = PlanRow(
        weights=kept.name,
        mode=mode,
        resident=resident if mode == "layers" else {},
        peak=peak,
        locked=locked,
        streamed=_moved(weights.layers["gen"], mode, resident.get("gen", 0))
        if task.paints
        else 0.0,
        fits=peak <= machine.device and locked <= machine.host,
    )
    return _timed(row, config, kept, task, machine) if row.fits else row


def _moved(layers: Sequence[float], mode: Mode, resident: int) -> float:
    """Bytes of layers that every pass moves to the device, where so many stay."""
    if mode != "layers":
        return 0.0
    stay = resident_layers(len(layers), resident)
    return sum(size for size, stays in zip(layers, stay, strict=True) if not stays)


def _timed(row: PlanRow, config: ModelConfig, kept: Kept, task: Task, machine: Machine) -> PlanRow:
    weights, rates = kept.weights, machine.rates

    def rate(stream: StreamName) -> float:
        """β, or that of the disk where the page cache cannot hold what is read."""
        cached = kept.read(stream) <= machine.host - row.locked
        return rates.copies if cached else min(rates.copies, rates.disk)

    text = TEXT_SHARE * rates.memory / decoded_bytes(config, weights)
    if moved := _moved(_of_token(config, weights), row.mode, row.resident.get("und", 0)):
        text = min(text, rate("und") / moved)
    if not task.paints:
        return replace(row, text=text)
    step = max(step_operations(config, task) / rates.products, row.streamed / rate("gen"))
    # What does not stay between the streams is read anew at each change.
    changes = 0.0
    if row.mode != "all":
        changes = sum((weights.stream(s) + weights.rest[s]) / rate(s) for s in STREAMS)
        changes += weights.lm_head / rate("und") if task.writes else 0.0
    prefill = prefill_operations(config, task) / rates.products
    image = task.steps * step + prefill + changes + task.think / text
    return replace(row, step=step, image=image, text=text)


def machine_modes(machine: Machine) -> tuple[Mode, ...]:
    """The modes that a machine serves, in the order in which `auto` tries them."""
    return tuple(mode for mode in MODES if mode != "layers" or machine.by_layers)


def plan_rows(
    config: ModelConfig, kept: Sequence[Kept], task: Task, machine: Machine
) -> list[PlanRow]:
    """Rows of every form of the weights, in the order in which `auto` tries them.

    With "layers" as many layers stay as fit; none, where not even that does.
    """
    rows = []
    for form in kept:
        working = working_bytes(config, task, form.itemsize, least_prefill_rows(task))
        most = None
        if machine.by_layers:
            most = fitting_layers(form.weights, working, machine.device, unified=machine.unified)
        none: dict[StreamName, int] = dict.fromkeys(task.streams, 0)
        for mode in machine_modes(machine):
            rows.append(plan_row(config, form, task, machine, mode, none))
        if most is not None and rows[-2].fits is False and most != none:
            rows.append(plan_row(config, form, task, machine, "layers", most))
    return rows


def first_fit(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The row that memory="auto" takes of one form of the weights; None where nothing fits.

    Of rows by layers, the one that keeps most.
    """
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    best = min(fitting, key=lambda row: MODES.index(row.mode))
    same = [row for row in fitting if row.mode == best.mode]
    return max(same, key=lambda row: sum(row.resident.values()))
