"""Backward passes that reach every layer on every rank, whatever its pack holds.

A rank gathers a layer for the backward pass when that reaches it, and the others wait for it. Where
the understanding stream is frozen, nothing in a pack of texts alone would require a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neounify.model.neo import NeoUnify


class Reaching(torch.autograd.Function):
    """A loss whose backward pass also reaches some states, with gradients of zero."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *states: Tensor) -> Tensor:
        ctx.like = [(states.shape, states.dtype, states.device) for states in states]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like
        )
        return gradient, *zeros


def reach_every_layer(objective: nn.Module, model: NeoUnify) -> None:
    """Let the backward pass of an objective reach every layer of its model.

    For units that are sharded already: their hooks see it.
    """
    reached: list[Tensor] = []

    def begin(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        reached.clear()
        hidden, *others = arguments
        if torch.is_grad_enabled() and not any(x.requires_grad for x in hidden.values()):
            hidden = {name: x.detach().requires_grad_() for name, x in hidden.items()}
        return hidden, *others

    def end(layer: nn.Module, arguments: Any, hidden: Any) -> None:
        reached.extend(x for x in hidden.values() if x.requires_grad)

    def finish(module: nn.Module, arguments: Any, loss: Tensor) -> Any:
        return Reaching.apply(loss, *reached)

    model.layers[0].register_forward_pre_hook(begin, prepend=True)
    model.layers[-1].register_forward_hook(end)
    objective.register_forward_hook(finish)
