"""EMA of the weights, used for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """mean ← d · mean + (1 - d) · weight, d = min(decay, (1 + n) / (10 + n)) after n updates.

    The ramp forgets the first, untrained weights. Frozen parameters are not copied. Kept in
    float32 on the model's device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.mean = {n: p.detach().float().clone() for n, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        means = list(self.mean.values())
        live = [self._live[name].detach().float() for name in self.mean]
        torch._foreach_lerp_(means, live, 1 - decay)

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
            p.copy_(self.mean[name])
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
            parameter.copy_(mean[name])
