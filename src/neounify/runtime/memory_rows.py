"""Rows of a memory plan: every mode with its peak and its times, and the first that fits.

A step takes max(F/φ, S/β): F operations at the sustained rate φ, S streamed bytes at the rate of
copies β, or at the disk's where the page cache cannot hold the stream that is read. Bytes that move
are those of files; what does not pass through locked buffers comes at a third of β.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

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
PAGEABLE = 1 / 3
"""Share of β that copies from mapped files reach, which are not locked."""


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

    def share(self, stream: StreamName) -> float:
        """Bytes of files for each byte of a stream as kept."""
        if self.stored is None:
            return 1.0
        return self.stored[stream] / (self.weights.stream(stream) + self.weights.rest[stream])


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One form of the weights in one mode, in bytes and seconds.

    `resident`: layers of each stream that stay. `text` is tokens a second. `image` is the time of
    an image or clip, `step` of a step, of a frame where clips are made frame by frame. Times are
    None where the row does not fit, `step` and `image` also where no image is asked for.
    """

    weights: str
    mode: Mode
    resident: Resident
    peak: float
    locked: float
    streamed: float
    peak_fits: bool
    locked_fits: bool
    step: float | None = None
    image: float | None = None
    text: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the device holds the peak, and the host what is locked."""
        return self.peak_fits and self.locked_fits

    @property
    def only_locks(self) -> bool:
        """Whether all that does not fit is what it locks on the host."""
        return self.peak_fits and not self.locked_fits


class Fitted(NamedTuple):
    """A mode, with "layers" the layers of each stream that stay, and the peak by the plan.

    The peak is None where no plan was made.
    """

    memory: Mode
    resident: Resident = MappingProxyType({})
    peak: float | None = None


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
    """F of a denoising step: 2 · P · R + 4 · b · n · (n + prefix) · Q · L.

    Of a clip frame by frame a mean step, whose frame sees half of the others.
    """
    n = task.tokens(config)
    parameters = passed_parameters(config, "gen") + rest_units(config)["gen"].rest
    pairs = n * (task.branches * (n + task.prefix) + task.seen(config) / 2)
    queries = config.num_heads * config.head_dim
    return task.branches * 2.0 * parameters * n + 4.0 * pairs * queries * config.num_layers


def prefill_operations(config: ModelConfig, task: Task) -> float:
    """F of the prompts of all branches, every token attending to half of the others.

    Of a clip frame by frame that of the finished frames too, behind one of them.
    """
    branches = task.branches if task.paints else 1
    n, seen = task.prefix - task.think, task.seen(config)
    queries = config.num_heads * config.head_dim
    pairs = 2.0 * (branches * n * n + seen * (2 * n + seen)) * queries * config.num_layers
    return 2.0 * passed_parameters(config, "und") * (branches * n + seen) + pairs


def decoded_bytes(config: ModelConfig, weights: WeightBytes) -> float:
    """Bytes of weights that one decoded token reads: its experts, and the text head."""
    head = weights.embedding if config.tie_embeddings else weights.lm_head
    return head + sum(_of_token(config, weights))


def _of_token(config: ModelConfig, weights: WeightBytes) -> list[float]:
    """Bytes of each layer that one decoded token reads."""
    units = [layer_unit(config, "und", number) for number in range(config.num_layers)]
    return [
        size * _passed(config, "und", number) / (unit.codes + unit.rest)
        for number, (unit, size) in enumerate(zip(units, weights.layers["und"], strict=True))
    ]


# --- rows ---


def planned_peak(
    config: ModelConfig, kept: Kept, task: Task, machine: Machine, mode: Mode, resident: Resident
) -> float:
    """Peak of one mode, with branches apart and prompts cut where the machine is short of memory.

    Branches are apart by the rule of the denoiser, of the memory that the weights leave.
    """

    def peak_of(working: Mapping[StreamName, float]) -> float:
        unified, process = machine.unified, machine.process
        return peak_bytes(kept.weights, mode, working, resident, unified=unified, process=process)

    free = machine.device - peak_of(dict.fromkeys(task.streams, 0.0))
    together = UNLIMITED
    if free > 0:
        together = fitting_branch_rows(config, kept.itemsize, int(free))
    # Prompts that do not fit in one call are cut, down to the size of an image.
    for limit in (PREFILL_ROWS, least_prefill_rows(task)):
        working = working_bytes(config, task, kept.itemsize, limit, together)
        peak = peak_of(working)
        if peak <= machine.device:
            break
    return peak


def fitting_layers(
    config: ModelConfig, kept: Kept, task: Task, machine: Machine
) -> dict[StreamName, int] | None:
    """The most layers of each stream that may stay; None where not even none fits."""
    chosen: dict[StreamName, int] = {}
    for name in task.streams:
        alone = replace(task, stream=name)
        fits = [
            r
            for r in range(config.num_layers + 1)
            if planned_peak(config, kept, alone, machine, "layers", {name: r}) <= machine.device
        ]
        if not fits:
            return None
        chosen[name] = max(fits)
    return chosen


def plan_row(
    config: ModelConfig, kept: Kept, task: Task, machine: Machine, mode: Mode, resident: Resident
) -> PlanRow:
    """The row of one mode; `resident` counts with "layers" only."""
    peak = planned_peak(config, kept, task, machine, mode, resident)
    stay = resident if mode == "layers" else {}
    staged = mode == "layers" and not machine.unified
    coming = [s for s in task.streams if staged and stay.get(s, 0) < config.num_layers]
    locked = max((kept.weights.locked(name) for name in coming), default=0.0)
    streamed = 0.0
    if "gen" in task.streams:
        moved = _moved(kept.weights.layers["gen"], mode, stay.get("gen", 0))
        streamed = kept.share("gen") * moved
    row = PlanRow(
        weights=kept.name,
        mode=mode,
        resident=stay,
        peak=peak,
        locked=locked,
        streamed=streamed,
        peak_fits=peak <= machine.device,
        locked_fits=locked <= machine.host,
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

    def moving(sizes: Sequence[float], stream: StreamName) -> float:
        """Bytes of files that come with every pass through layers of these sizes."""
        return kept.share(stream) * _moved(sizes, row.mode, row.resident.get(stream, 0))

    text = TEXT_SHARE * rates.memory / decoded_bytes(config, weights)
    if moved := moving(_of_token(config, weights), "und"):
        text = min(text, rate("und") / moved)
    written = text if config.lm_head else None
    if not task.paints:
        return replace(row, text=written)
    images = task.images(config)
    step = max(step_operations(config, task) / rates.products, row.streamed / rate("gen"))
    # Each finished frame of a clip that others follow is read as a prompt is.
    prompts = images * moving(weights.layers["und"], "und") / rate("und")
    prefill = max(prefill_operations(config, task) / rates.products, prompts)
    # What stays as long as its stream works is copied from mapped files at each change.
    changes = 0.0
    if row.mode != "all":
        pageable = rates.copies * (1 if machine.unified else PAGEABLE)
        for name in STREAMS:
            whole = kept.share(name) * (weights.stream(name) + weights.rest[name])
            copied = whole - moving(weights.layers[name], name)
            changes += images * copied / min(rate(name), pageable)
    image = images * task.steps * step + prefill + changes + task.think / text
    return replace(row, step=step, image=image, text=written)


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
        most = fitting_layers(config, form, task, machine) if machine.by_layers else None
        none: dict[StreamName, int] = dict.fromkeys(task.streams, 0)
        for mode in machine_modes(machine):
            rows.append(plan_row(config, form, task, machine, mode, none))
        if most is not None and rows[-2].fits is False and most != none:
            rows.append(plan_row(config, form, task, machine, "layers", most))
    return rows


def nearest(rows: Sequence[PlanRow]) -> PlanRow:
    """Of rows that do not fit, one that only locks too much, else the one with the least peak."""
    return min(rows, key=lambda row: (not row.only_locks, row.peak))


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
