"""AdamW and Muon over groups of parameters, and how the learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn import Parameter

from neounify.checkpoint.names import LABELS, part_of, stream_of
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
from neounify.errors import CheckpointError, ConfigError
from neounify.lora.layers import weight_name

ScheduleName = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """`muon`: the matrices inside the layers by Muon, all else by AdamW.

    Muon's updates are scaled to AdamW's size (Moonlight, arXiv 2502.16982), so one learning
    rate serves both. Weight decay acts on matrices only. `lr_scale` multiplies the rate of a
    stream ("und", "gen") or a part ("image head", …; see checkpoint/names.py).
    """

    name: OptimizerName = "adamw"
    learning_rate: Positive = 2e-5
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Positive = 1e-8
    momentum: BelowOne = 0.95
    weight_decay: NonNegative = 0.0
    lr_scale: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_weights("lr_scale", self.lr_scale, LABELS)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Schedule:
    """Linear warm-up from 0, then the learning rate's share by `name` down to `final`.

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


_KEPT: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}
"""What an optimizer keeps of each parameter."""


class Optimizers:
    """One or two of torch's optimizers as one."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.members: list[torch.optim.Optimizer] = []
        groups = _groups(model, config)
        adam = [g for kind, g in groups if kind == "adamw"]
        muon = [g for kind, g in groups if kind == "muon"]
        if adam:
            self.members.append(
                torch.optim.AdamW(
                    adam, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
                )
            )
        if muon:
            self.members.append(
                torch.optim.Muon(
                    muon,
                    lr=config.learning_rate,
                    momentum=config.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if not self.members:
            raise ValueError("every parameter is frozen: there is nothing to train")

    def set_factor(self, factor: float) -> float:
        """Scale all learning rates by the schedule's factor; the resulting base rate."""
        for group in self._all_groups():
            group["lr"] = self.config.learning_rate * group["scale"] * factor
        return self.config.learning_rate * factor

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [member.state_dict() for member in self.members]

    def names(self) -> list[list[str]]:
        """The parameters of each optimizer, in the order in which its state numbers them."""
        return [[n for group in m.param_groups for n in group["names"]] for m in self.members]

    def load_state(
        self, saved: Sequence[Mapping[int, Mapping[str, Any]]], names: Any = None
    ) -> None:
        """Take over what each optimizer kept of its parameters, by their `names` at that time.

        A change of settings may have put parameters in another order since. Without names, as in
        states of earlier versions, the order must be the same. Raises CheckpointError when other
        parameters were trained, or by another optimizer; torch would compute with their states.
        """
        before = _checked_names(names) or self.names()
        if changed := sorted(set(chain(*before)) ^ set(chain(*self.names()))):
            raise CheckpointError(
                f"the state is of a run that trained other parameters ({len(changed)} differ, "
                f"{changed[0]} first): give freeze and lora the values they had, or start anew"
            )
        try:
            kept = {
                before[member][place]: values
                for member, places in enumerate(saved)
                for place, values in places.items()
            }
        except IndexError as error:
            raise CheckpointError(
                "the state is of another optimizer or other parameters"
            ) from error
        for member, mine in zip(self.members, self.names(), strict=True):
            parameters = [p for group in member.param_groups for p in group["params"]]
            for name, parameter in zip(mine, parameters, strict=True):
                _check_kept(name, parameter, kept.get(name), _KEPT[type(member)])
            state = {n: dict(kept[name]) for n, name in enumerate(mine) if name in kept}
            member.load_state_dict({**member.state_dict(), "state": state})

    def _all_groups(self) -> Iterator[dict[str, Any]]:
        for member in self.members:
            yield from member.param_groups


def _checked_names(names: Any) -> list[list[str]]:
    """`Optimizers.names` out of a state's JSON; empty where it has none."""
    if not isinstance(names, list) or not all(isinstance(row, list) for row in names):
        return []
    return [[str(name) for name in row] for row in names]


def _check_kept(
    name: str, parameter: Parameter, values: Mapping[str, Any] | None, keys: set[str]
) -> None:
    """Raise CheckpointError for values that cannot be what an optimizer kept of a parameter."""
    if values is None:  # it never had a gradient
        return
    if set(values) != keys:
        raise CheckpointError(
            f"the state is of another optimizer: of {name} it keeps {sorted(values)}, needed are "
            f"{sorted(keys)}. Give optimizer.name the value it had, or start anew"
        )
    for key, value in values.items():
        if key != "step" and value.shape != parameter.shape:
            raise CheckpointError(
                f"the state does not fit: {key} of {name} has shape {list(value.shape)}, the "
                f"parameter {list(parameter.shape)}"
            )


def _groups(model: nn.Module, config: OptimizerConfig) -> list[tuple[str, dict[str, Any]]]:
    """(optimizer, group) pairs; a group shares learning rate and weight decay.

    Raises ConfigError for a name in `lr_scale` that no parameter of this model has.
    """
    names = [weight_name(name) for name, _ in model.named_parameters()]
    present = {label for name in names for label in (stream_of(name), part_of(name))}
    if absent := sorted(set(config.lr_scale or {}) - present):
        raise ConfigError(
            f"lr_scale: this model has no {', '.join(absent)}; it has {sorted(present)}"
        )
    collected: dict[tuple[str, float, float], list[tuple[str, Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = name.startswith("layers.") and parameter.ndim == 2
        kind = "muon" if config.name == "muon" and inner else "adamw"
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        key = (kind, _scale(name, config.lr_scale or {}), decay)
        collected.setdefault(key, []).append((name, parameter))
    return [
        (
            kind,
            {
                "params": [parameter for _, parameter in found],
                "names": [name for name, _ in found],
                "scale": scale,
                "weight_decay": decay,
            },
        )
        for (kind, scale, decay), found in collected.items()
    ]


def _scale(name: str, scales: Mapping[str, float]) -> float:
    base = weight_name(name)
    found = 1.0
    for key in (stream_of(base), part_of(base)):
        found *= scales.get(key, 1.0)
    return found
