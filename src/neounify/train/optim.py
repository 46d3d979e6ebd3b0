"""Optimizer sets (AdamW and Muon over groups of parameters, schedule, clipping, state) and EMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from neounify.checkpoint.names import part_of, stream_of
from neounify.config.ranges import (
    STRICT,
    AboveZero,
    BelowOne,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    check_weights,
)
from neounify.distributed.shards import local, mesh_of, to_host, total_norm
from neounify.errors import CheckpointError, ConfigError
from neounify.lora.layers import weight_name
from neounify.model.parts import LABELS
from neounify.train.muon import Muon

ScheduleName = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """`muon`: the matrices inside the layers by Muon, all else by AdamW.

    Muon's updates are scaled to AdamW's size (Moonlight, arXiv 2502.16982), so one learning
    rate serves both. Weight decay acts on matrices only. `lr_scale` multiplies the rate of a
    stream ("und", "gen") or a part ("image head", …; see model/parts.py).
    """

    name: OptimizerName = "adamw"
    learning_rate: Positive = 2e-5
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Positive = 1e-8
    momentum: BelowOne = 0.95
    weight_decay: NonNegative = 0.0
    lr_scale: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.lr_scale is not None:
            check_weights("lr_scale", self.lr_scale, LABELS)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Schedule:
    """Linear warm-up from 0, then the learning rate's factor by `name` down to `final`.

    `linear` and `cosine` fall over the last `decay` share of the steps after the warm-up.
    """

    name: ScheduleName = "cosine"
    warmup: NonNegativeInt = 0
    final: Fraction = 0.0
    decay: AboveZero = 1.0

    def at(self, step: int, steps: int) -> float:
        """The factor of step 0..steps-1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        length = max(1, steps - self.warmup)
        start = self.warmup + (1 - self.decay) * length
        done = min(1.0, max(0.0, (step - start) / max(1e-9, self.decay * length)))
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else 1 - done
        return self.final + (1 - self.final) * shape

    def over(self, steps: int) -> Callable[[int], float]:
        """The factor as a function of the step, for a stage of so many steps."""
        return partial(self.at, steps=steps)


_STATE_KEYS: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    Muon: {"momentum_buffer"},
}
"""The state of an optimizer for each parameter."""


def constant(_: int) -> float:
    """The schedule of a constant learning rate."""
    return 1.0


def every_step(_: int) -> bool:
    """The turns of an optimizer that moves in every step."""
    return True


class OptimizerSet:
    """AdamW and Muon over some parameters, which move together.

    `parameters` by name; frozen ones are left out. Their gradients are clipped to a norm of `clip`.
    `schedule` gives the factor of the learning rate and `active` whether the set moves, both by
    the step of the stage. `prefix` keeps the names of a second model apart in a saved state.
    Raises ConfigError for an `lr_scale` of parameters that are not there, ValueError where all
    are frozen.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        config: OptimizerConfig,
        *,
        clip: float = 1.0,
        schedule: Callable[[int], float] = constant,
        active: Callable[[int], bool] = every_step,
        prefix: str = "",
    ) -> None:
        self.config, self.clip, self.schedule, self.active = config, clip, schedule, active
        self.name = prefix.rstrip(".") or "model"
        ordered = (parameters[name] for name in _norm_order(parameters))
        self.parameters = [p for p in ordered if p.requires_grad]
        self.members: list[torch.optim.Optimizer] = []
        groups = _groups(parameters, config, prefix)
        adam = [g for kind, g in groups if kind == "adamw"]
        muon = [g for kind, g in groups if kind == "muon"]
        if adam:
            self.members.append(
                torch.optim.AdamW(
                    adam, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
                )
            )
        if muon:
            self.members.append(Muon(muon, lr=config.learning_rate, momentum=config.momentum))
        if not self.members:
            raise ValueError(
                f"all {len(parameters)} parameters are frozen: there is nothing to train"
            )

    def set_rate(self, step: int) -> float:
        """Set the learning rates of a step of the stage; the resulting base rate."""
        factor = self.schedule(step)
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = self.config.learning_rate * group["scale"] * factor
        return self.config.learning_rate * factor

    def trains(self, model: nn.Module) -> bool:
        """Whether parameters of a model are among its own."""
        inside = {id(parameter) for parameter in model.parameters()}
        return any(id(parameter) in inside for parameter in self.parameters)

    def clip_gradients(self) -> Tensor:
        """Clip the gradients to the norm `clip`; their norm before, a scalar."""
        meshes: dict[DeviceMesh | None, list[Parameter]] = {}
        for parameter in self.parameters:
            meshes.setdefault(mesh_of(parameter), []).append(parameter)
        norms = [
            total_norm([p.grad for p in some if p.grad is not None]) for some in meshes.values()
        ]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        for some in meshes.values():
            torch.nn.utils.clip_grads_with_norm_(some, self.clip, norm)
        return norm

    def fill_gradients(self) -> None:
        """Give every parameter that nothing reached a gradient of zero.

        It is stepped like the others: a rank that reached it has a gradient, and all must agree.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Any]]:
        """The state of each parameter that has one, by name."""
        return {
            name: member.state[parameter]
            for member in self.members
            for group in member.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter in member.state
        }

    def named(self) -> dict[str, Parameter]:
        """The trained parameters by the names of their states."""
        return {
            name: parameter
            for member in self.members
            for group in member.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }

    def names(self) -> list[list[str]]:
        """Parameter names of each member, in the order in which its state numbers them."""
        return [[n for group in m.param_groups for n in group["names"]] for m in self.members]

    def load_state(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the state of each parameter, by name. Raises CheckpointError."""
        for member, names in zip(self.members, self.names(), strict=True):
            parameters = [p for group in member.param_groups for p in group["params"]]
            for name, parameter in zip(names, parameters, strict=True):
                _check_state(name, parameter, states.get(name), _STATE_KEYS[type(member)])
            state = {n: dict(states[name]) for n, name in enumerate(names) if name in states}
            member.load_state_dict({**member.state_dict(), "state": state})


def take_step(active: Sequence[OptimizerSet]) -> tuple[list[Tensor], Tensor, bool]:
    """Clip the gradients of optimizer sets and step, unless their common norm is not finite.

    The norms are over all ranks, so that all step or none does.

    Returns:
        The gradient norm of each set and of all, scalars before clipping, and whether the step
        was taken. Without a set the norm is 0 and the step counts as taken.
    """
    for one in active:
        one.fill_gradients()
    norms = [one.clip_gradients() for one in active]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm() if norms else torch.zeros(())
    taken = bool(torch.isfinite(norm))
    if taken:
        for one in active:
            one.step()
    return norms, norm, taken


def all_names(sets: Sequence[OptimizerSet]) -> list[list[str]]:
    """Parameter names of all members of all sets, in the order of a saved state."""
    return [names for one in sets for names in one.names()]


def states_like(sets: Sequence[OptimizerSet]) -> dict[str, Tensor]:
    """For every state that is as large as its parameter, by "parameter.key", the parameter."""
    return {
        f"{name}.{key}": parameter
        for one in sets
        for name, parameter in one.named().items()
        for keys in _STATE_KEYS.values()
        for key in keys - {"step"}
    }


def load_optimizers(
    sets: Sequence[OptimizerSet], states: Mapping[str, Mapping[str, Any]], names: Any
) -> None:
    """Restore optimizers from the saved state of each parameter, by name.

    `names` are those that the run trained (`all_names`); states of earlier versions may have none.
    Raises CheckpointError when other parameters were trained, or by another optimizer.
    """
    now = set(chain(*all_names(sets)))
    before = set(chain(*checked_names(names)))
    if changed := sorted(before ^ now if before else set(states) - now):
        raise CheckpointError(
            f"the state is of a run that trained other parameters ({len(changed)} differ, "
            f"{changed[0]} first): give freeze and lora the values they had, or start a new run"
        )
    for one in sets:
        one.load_state(states)


def checked_names(names: Any) -> list[list[str]]:
    """`all_names` from a state's JSON; empty where it has none."""
    if not isinstance(names, list) or not all(isinstance(row, list) for row in names):
        return []
    return [[str(name) for name in row] for row in names]


def _check_state(
    name: str, parameter: Parameter, values: Mapping[str, Any] | None, keys: set[str]
) -> None:
    """Raise CheckpointError for values that cannot be the optimizer's state of a parameter."""
    if values is None:  # it never had a gradient
        return
    if set(values) != keys:
        raise CheckpointError(
            f"the state is of another optimizer: for {name} it holds {sorted(values)}, needed are "
            f"{sorted(keys)}. Give optimizer.name the value it had, or start a new run"
        )
    for key, value in values.items():
        if key != "step" and value.shape != parameter.shape:
            raise CheckpointError(
                f"the state does not fit: {key} of {name} has shape {list(value.shape)}, the "
                f"parameter {list(parameter.shape)}"
            )


def _groups(
    parameters: Mapping[str, Parameter], config: OptimizerConfig, prefix: str
) -> list[tuple[str, dict[str, Any]]]:
    """(optimizer, group) pairs; a group shares learning rate and weight decay.

    Raises ConfigError for a name in `lr_scale` that no parameter has.
    """
    scales = config.lr_scale or {}
    present = {label for name in parameters for label in _labels(name)}
    if absent := sorted(set(scales) - present):
        raise ConfigError(
            f"lr_scale: this model has no {', '.join(absent)}; it has {sorted(present)}"
        )
    # Operators on many tensors at once want all of one mesh.
    groups: dict[tuple[str, float, float, Any], list[tuple[str, Parameter]]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        inner = name.startswith("layers.") and parameter.ndim >= 2
        kind = "muon" if config.name == "muon" and inner else "adamw"
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        scale = math.prod([scales.get(label, 1.0) for label in _labels(name)], start=1.0)
        key = (kind, scale, decay, mesh_of(parameter))
        groups.setdefault(key, []).append((name, parameter))
    return [
        (
            kind,
            {
                "params": [parameter for _, parameter in named],
                "names": [prefix + name for name, _ in named],
                "scale": scale,
                "weight_decay": decay,
            },
        )
        for (kind, scale, decay, _), named in groups.items()
    ]


def _labels(name: str) -> tuple[str, ...]:
    """Stream and part of a parameter; none for parameters of other modules than the model."""
    try:
        return stream_of(weight_name(name)), part_of(weight_name(name))
    except KeyError:
        return ()


_FIRST_OF_STREAM = ("qkv.input_norm", "qkv.q_proj", "qkv.k_proj", "qkv.v_proj", "out.o_proj")


def _norm_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which the gradient norm is summed, which decides its last bit.

    Saved runs had a stream's output projection before the norms of its heads; they continue to the
    same bits.
    """
    streams: dict[str, int] = {}

    def key(name: str) -> tuple[int, bool]:
        parts = name.split(".")
        stream = ".".join(parts[:3]) if parts[0] == "layers" else name
        later = ".".join(parts[3:5]) not in _FIRST_OF_STREAM
        return streams.setdefault(stream, len(streams)), later

    return sorted(names, key=key)


class Ema:
    """mean ← d · mean + (1 - d) · weight, d = min(decay, (1 + n) / (10 + n)) after n updates.

    The ramp forgets the first, untrained weights. Frozen parameters are not copied. Kept in
    float32 on the model's device, or in host memory.
    """

    def __init__(self, model: nn.Module, decay: float, *, on_host: bool = False) -> None:
        self.decay = decay
        self.updates = 0
        self._live = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.mean = {
            n: to_host(p.detach().float()) if on_host else p.detach().float().clone()
            for n, p in self._live.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        means = [local(mean) for mean in self.mean.values()]
        live = [local(p.detach()).float() for p in self._live.values()]
        here = [weight.to(mean.device) for weight, mean in zip(live, means, strict=True)]
        torch._foreach_lerp_(means, here, 1 - decay)

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a saved mean; KeyError when a parameter is missing."""
        with torch.no_grad():
            for name, mean in self.mean.items():
                mean.copy_(tensors[name])
        self.updates = updates

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The mean in the model, the trained weights back afterwards."""
        trained = {name: p.detach().clone() for name, p in self._live.items()}
        for name, p in self._live.items():
            local(p).copy_(local(self.mean[name]))
        try:
            yield
        finally:
            for name, p in self._live.items():
                p.copy_(trained[name])


@torch.no_grad()
def load_ema(model: nn.Module, mean: Mapping[str, Tensor]) -> None:
    """Copy an EMA into a model; parameters that it does not hold stay."""
    for name, parameter in model.named_parameters():
        if name in mean:
            local(parameter).copy_(local(mean[name]))
