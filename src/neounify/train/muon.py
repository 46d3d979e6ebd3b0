"""Muon: momentum, made orthogonal by Newton-Schulz iterations; on many ranks by owners."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.checkpoint.dtypes import multiplies
from neounify.distributed.owners import on_matrices
from neounify.distributed.shards import local

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of a quintic iteration, and how often it is applied (Jordan et al. 2024, Muon)."""
NEWTON_SCHULZ_STEPS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for matrices and stacks of them; settings and state are those of torch.optim.Muon.

    Of matrices cut over ranks the momentum stays cut, and each is orthogonalised whole by the rank
    that owns it (`distributed.owners`), with the bits of one rank.

    torch.optim.Muon orthogonalises in bfloat16 whatever computes it. On a CPU without products in
    bfloat16 that is many times as slow as float32 (docs/log.md), which then takes its place. The
    choice is by the processor's features, not by timing, so a machine always makes the same one.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        device = self.param_groups[0]["params"][0].device
        self.in_bfloat16 = device.type != "cpu" or multiplies(torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step, all parameters in the same precision."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            momenta = [self._momentum(parameter, group) for parameter in trained]
            updates = on_matrices(trained, momenta, self._orthogonal)
            for parameter, update in zip(trained, updates, strict=True):
                self._move(local(parameter), max(parameter.shape[-2:]), update, group)
        return None

    def _momentum(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The gradient with Nesterov's momentum, of the rows held here."""
        state, momentum = self.state[parameter], group["momentum"]
        assert parameter.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient = local(parameter.grad)
        buffer = local(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)

    def _orthogonal(self, update: Tensor) -> Tensor:
        """The orthogonal matrices next to updates, as torch computes them or in their own dtype."""
        return orthogonal(update.bfloat16() if self.in_bfloat16 else update)

    def _move(
        self, parameter: Tensor, longest: int, update: Tensor, group: Mapping[str, Any]
    ) -> None:
        """Move a matrix, or the rows held here; `longest` is the longer side of the whole."""
        # Both are lr · 0.2 · √longest, in the order of each precision's earlier versions.
        rate = group["lr"] * 0.2 * math.sqrt(longest)
        if self.in_bfloat16:
            rate = group["lr"] * (0.2 * math.sqrt(longest))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonal(
    matrix: Float[Tensor, "*stack rows columns"],
) -> Float[Tensor, "*stack rows columns"]:
    """A matrix, or each of a stack, with singular values near 1, by Newton-Schulz iterations in
    its own dtype."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    single = matrix.ndim == 2
    norm = x.norm() if single else x.flatten(1).norm(dim=1)[:, None, None]
    add_product = torch.addmm if single else torch.baddbmm
    x = x / norm.clamp(min=SMALLEST_NORM)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
