"""Experts dealt out to the ranks of the `expert` axis: rows go to the rank that owns their expert.

On rank r of n, of E experts in all:

    rows by expert ── all-to-all ──> rows of my E/n experts, from every rank
                                     my experts
    weighted sum   <── all-to-all ── results

The order of the rows at home is that of one rank, and so is the sum over a token's experts.

An exchange needs every rank of the axis. So each calls every stream in every layer, one that a pack
lacks with no rows, and every loss reaches the last layer's states of all streams in its backward
pass. The passes then have the same exchanges in the same order on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

# 2.13 takes a mesh of each parameter from these, and does not export them.
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from neounify.distributed.mesh import MeshShape
from neounify.distributed.reaching import Reaching
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN, STREAMS, UND, StreamName
from neounify.model.stream import (
    PROJECTIONS,
    Attend,
    Layer,
    Projected,
    Rotation,
    SparseMlp,
    StackedExperts,
    product_dtype,
    run_experts,
)

Placement = Callable[[nn.Parameter], "ShardPlacementResult | Shard | None"]
"""How a unit cuts each of its parameters, and over which mesh; None as it cuts by default."""


def place_experts(model: NeoUnify, shape: MeshShape, device: str) -> Placement:
    """Deal out the stacked experts to the ranks of `expert`; how units cut what each rank then has.

    They are cut over `shard` alone, by the rows of their matrices, or without the axis by experts
    where they divide. The parameters of `model` are replaced.
    """
    experts: dict[nn.Parameter, Shard] = {}
    mesh = shape.build_experts(device) if shape.expert > 1 else None
    for mlp in model.sparse_mlps:
        for name in PROJECTIONS if isinstance(mlp.experts, StackedExperts) else ():
            weight = mlp.experts.get_parameter(name)
            if isinstance(weight, DTensor):  # of a stream that is never called
                continue
            if mesh is not None:
                share = distribute_tensor(
                    weight.detach(), mesh["expert"], [Shard(0)], src_data_rank=None
                )
                weight = nn.Parameter(share, weight.requires_grad)
                mlp.experts.register_parameter(name, weight)
            count, rows = weight.shape[:2]
            cuts = shape.cuts // shape.expert
            whole = mesh is None and count % cuts == 0
            experts[weight] = Shard(0 if whole or rows % cuts else 1)
        if mesh is not None:
            mlp.call = partial(_exchanged, group=mesh.get_group("expert"))
    return partial(
        _placement, experts=experts, mesh_info=None if mesh is None else _mesh_info(mesh)
    )


def _mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    """The ranks that hold the same experts."""
    if mesh.size(0) == 1:
        return FSDPMeshInfo(mesh["shard"], shard_mesh_dim=0)
    return HSDPMeshInfo(mesh["replicate", "shard"], shard_mesh_dim=1, replicate_mesh_dim=0)


def _placement(
    parameter: nn.Parameter,
    *,
    experts: Mapping[nn.Parameter, Shard],
    mesh_info: FSDPMeshInfo | None,
) -> ShardPlacementResult | Shard | None:
    cut = experts.get(parameter)
    if cut is None or mesh_info is None:
        return cut
    return ShardPlacementResult(cut, mesh_info)


def _exchanged(
    experts: nn.Module,
    rows: Float[Tensor, "m size"],
    ends: Int[Tensor, " experts"],
    *,
    group: distributed.ProcessGroup,
) -> Float[Tensor, "m size"]:
    """The results of rows in the order of all experts, computed where the experts are."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    incoming = torch.empty_like(counts)
    distributed.all_to_all_single(incoming, counts, group=group)
    by_rank = incoming.view(group.size(), -1)  # [ranks, my experts]
    sent = counts.view(group.size(), -1).sum(1).tolist()
    received = by_rank.sum(1).tolist()
    arrived: Tensor = _AllToAll.apply(rows.to(product_dtype(rows)), sent, received, group)
    # They come by rank and in it by expert; experts take them by expert, and in it by rank.
    numbers = torch.arange(by_rank.shape[1], device=rows.device).repeat(group.size())
    order = numbers.repeat_interleave(incoming).argsort(stable=True)
    weights = []
    for name in PROJECTIONS:
        weight = experts.get_parameter(name)
        assert isinstance(weight, DTensor)
        weights.append(weight.to_local())
    mine = by_rank.sum(0).cumsum(0).to(torch.int32)
    results = run_experts(arrived.index_select(0, order), mine, *weights)
    back: Tensor = _AllToAll.apply(results.index_select(0, order.argsort()), received, sent, group)
    return back


class _AllToAll(torch.autograd.Function):
    """Rows for each rank of a group, one after the other, to those that each rank sends here.

    Backward, the gradients go the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: list[int],
        received: list[int],
        group: distributed.ProcessGroup,
    ) -> Tensor:
        ctx.way = received, sent, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _all_to_all(gradient, *ctx.way), None, None, None


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: distributed.ProcessGroup
) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    distributed.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def call_every_stream(
    objective: nn.Module, model: NeoUnify, unused: Collection[StreamName] = ()
) -> None:
    """Make every call of an objective call all streams with experts, forward and backward; not
    those that are `unused` on all ranks.

    For units that are sharded already: their hooks see all streams too.
    """
    sparse = [name for name in STREAMS if any(_is_sparse(layer, name) for layer in model.layers)]
    kinds = [name for name in sparse if name not in unused]
    reached: list[Tensor] = []

    def begin(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, rotations, attend = arguments
        if layer is model.layers[0]:
            reached.clear()
            hidden = _all_streams(model, hidden, kinds)
        missing = {name: _no_rotation(model, x) for name, x in hidden.items() if not len(x)}
        return hidden, {**rotations, **missing}, partial(_attend_rows, attend)

    def end(layer: nn.Module, arguments: Any, hidden: dict[StreamName, Tensor]) -> Any:
        reached.extend(hidden[name] for name in kinds if hidden[name].requires_grad)
        return {name: states for name, states in hidden.items() if len(states)}

    def finish(module: nn.Module, arguments: Any, loss: Tensor) -> Any:
        return Reaching.apply(loss, *reached)

    for layer in model.layers:
        layer.register_forward_pre_hook(begin, prepend=True)
    model.layers[-1].register_forward_hook(end)
    objective.register_forward_hook(finish)


def _is_sparse(layer: nn.Module, name: StreamName) -> bool:
    assert isinstance(layer, Layer)
    return isinstance(layer[name].out.mlp, SparseMlp)


def _all_streams(
    model: NeoUnify, hidden: Mapping[StreamName, Tensor], kinds: Sequence[StreamName]
) -> dict[StreamName, Tensor]:
    """The embeddings of all streams; they require a gradient if those of any pack may."""
    some = next(iter(hidden.values()))
    every: dict[StreamName, Tensor] = {}
    for name in STREAMS:
        states = hidden.get(name)
        if states is None and name in kinds:
            states = some.new_zeros(0, some.shape[1])
        if states is not None:
            trained = any(p.requires_grad for p in _embedding(model, name))
            needs = trained and torch.is_grad_enabled() and not states.requires_grad
            every[name] = states.detach().requires_grad_() if needs else states
    return every


def _embedding(model: NeoUnify, name: StreamName) -> list[nn.Parameter]:
    """The parameters that stand before the first layer of a stream."""
    modules = {
        UND: ("embed_tokens", "und_patch", "und_tube"),
        GEN: ("gen_patch", "gen_tube", "timestep_embedder", "noise_scale_embedder"),
    }[name]
    children = dict(model.named_children())
    return [p for module in modules if module in children for p in children[module].parameters()]


def _no_rotation(model: NeoUnify, states: Tensor) -> Rotation:
    none = states.new_zeros(0, 1, model.config.head_dim)
    return Rotation(none, none)


def _attend_rows(
    attend: Attend, number: int, projected: Mapping[StreamName, Projected]
) -> Mapping[StreamName, Tensor]:
    """Attention of the streams that have rows; those without have no results either."""
    present = {name: one for name, one in projected.items() if len(one.q)}
    return {name: one.q for name, one in projected.items()} | dict(attend(number, present))
