"""The fixed order in which a model is spread over ranks for training.

1. The objective becomes one module: whatever a loss calls is below it. The experts of a layer
   become one weight per projection.
   Streams that are never called leave the devices.
2. Experts are dealt out to the ranks of `expert`, which exchange rows (`experts.py`).
3. Every layer becomes a unit: its parameters are gathered together, when it runs; experts over the
   ranks that hold the same ones.
4. The objective becomes the root unit: all that stands outside the layers, gathered once a step.
5. Gradients are summed over the ranks, those of parameters that nothing reached being zero.
6. Rows of a pack are cut over the ranks of `sequence`, which also share the parameters: a loss asks
   for its share of a layout, and adds what its rows have (`sequence.py`).

Where nothing is cut (`replicate` alone), steps 2 to 5 are one sum of gradients at a step's end; so
it is for adapters, which stay whole.

Freezing, compiling and recomputing are settings inside the units and come after; optimizers and the
EMA are made last, of what a rank holds. On one rank only the first applies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from neounify.distributed.experts import call_every_stream, place_experts
from neounify.distributed.mesh import MeshShape
from neounify.distributed.passes import passes_of_ranks
from neounify.distributed.ranks import ONE, Ranks
from neounify.distributed.reaching import reach_every_layer
from neounify.distributed.sequence import Share, share_of
from neounify.distributed.shards import keep_on_host
from neounify.model.layout import Layout
from neounify.model.neo import NeoUnify
from neounify.model.parts import StreamName


class Objective(nn.Module):
    """The root of all units: a function of the model and a pack that gives a loss.

    Its loss always requires a gradient, so that every rank calls backward for every pack, labels
    and images or not.
    """

    def __init__(self, model: NeoUnify) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """`function(model, *arguments)`, a scalar."""
        loss = function(self.model, *arguments)
        return loss + torch.zeros((), device=loss.device, requires_grad=True)


@dataclass(frozen=True, eq=False)
class Parallel:
    """A model spread over the ranks of a run."""

    objective: Objective
    ranks: Ranks
    shape: MeshShape
    packs: Ranks = ONE
    """The ranks that compute different packs at the same time."""
    sequence: Ranks = ONE
    """The ranks that compute the same pack."""
    gathered_in: torch.dtype = torch.float32
    """Dtype of parameters that are cut, when they are gathered."""

    def share(self, layout: Layout, attention: str = "auto") -> Share:
        """What this rank computes of a layout; `attention` names the backend of one rank."""
        model = self.objective.model
        return share_of(model, layout, attention, self.sequence, model.config.pairs_per_row)

    @property
    def cut(self) -> bool:
        """Whether parameters are cut over ranks; else each has them whole."""
        return isinstance(self.objective, FSDPModule)

    def add_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Sum the gradients of whole parameters over the ranks, at the end of a step; collective.

        Those of parameters that are cut are sums already.
        """
        if self.ranks.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.ranks.add_(*gradients)

    def last_of_step(self, last: bool) -> None:
        """Called before a forward: copies of the mesh add their gradients in a step's last one."""
        if self.shape.replicate > 1 and isinstance(self.objective, FSDPModule):
            self.objective.set_requires_all_reduce(last)

    def sampling(self) -> AbstractContextManager[NeoUnify]:
        """The model for inference, by each rank by itself; entering and leaving are collective."""
        model = self.objective.model
        if not isinstance(self.objective, FSDPModule):
            return nullcontext(model)
        return passes_of_ranks(self.objective, model, self.ranks, self.gathered_in)


def parallelize(
    model: NeoUnify,
    ranks: Ranks,
    shape: MeshShape | None = None,
    *,
    device: torch.device | None = None,
    bfloat16: bool = False,
    unused: Collection[StreamName] = (),
    uncut: Collection[Parameter] = (),
) -> Parallel:
    """Spread a model over the ranks, its parameters shards of their dtype.

    With `bfloat16` they are gathered in it, and gradients are summed in float32. Streams that are
    never called, `unused`, are cut over the ranks in host memory; the parameters `uncut` stay whole
    on every rank, and their gradients are summed at a step's end. A model without values gets them
    afterwards, on `device`; else all ranks must hold the same weights.
    """
    shape = shape or MeshShape(shard=ranks.size)
    objective = Objective(model)
    model.stack_experts()
    if shape.cuts > 1:
        kind = (device or model.device).type
        mesh = shape.build(kind)
        on_host = keep_on_host(model, unused, shape)
        placed = place_experts(model, shape, kind)
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for unit in (*model.layers, objective):
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=precision,
                shard_placement_fn=placed,
                ignored_params=on_host | set(uncut),
            )
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)
            # gloo has no reduction that multiplies.
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_reduce_scatter_unused_params(True)
        if shape.expert > 1:
            call_every_stream(objective, model, unused)
        else:
            reach_every_layer(objective, model)
    sequence, packs = ranks.split(shape.sequence)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    return Parallel(objective, ranks, shape, packs, sequence, dtype)
