"""AdamW and Muon over groups of parameters, and how the learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn import Parameter

from neounify.checkpoint.names import LABELS, part_of, stream_of
from neounify.errors import ConfigError
from neounify.lora.layers import weight_name
from neounify.settings import (
    STRICT,
    AboveZero,
    BelowOne,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    check_weights,
)

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

    def load_state(self, states: list[dict[str, Any]]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)

    def _all_groups(self) -> Iterator[dict[str, Any]]:
        for member in self.members:
            yield from member.param_groups


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
        (kind, {"params": found, "scale": scale, "weight_decay": decay})
        for (kind, scale, decay), found in collected.items()
    ]


def _scale(name: str, scales: Mapping[str, float]) -> float:
    base = weight_name(name)
    found = 1.0
    for key in (stream_of(base), part_of(base)):
        found *= scales.get(key, 1.0)
    return found
