"""Tensors and parameters cut over ranks: what a rank holds of them, and the whole of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from neounify.checkpoint.names import stream_of
from neounify.distributed.mesh import MeshShape
from neounify.model.neo import NeoUnify
from neounify.model.parts import StreamName


def keep_on_host(
    model: NeoUnify, streams: Collection[StreamName], shape: MeshShape
) -> set[nn.Parameter]:
    """Cut the weights of some streams over the ranks in host memory; no unit gathers them."""
    parameters: set[nn.Parameter] = set()
    mesh = shape.build("cpu") if streams else None
    for name, whole_one in list(model.named_parameters()):
        if mesh is None or stream_of(name) not in streams:
            continue
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        share = distribute_tensor(whole_one.detach(), mesh, placements, src_data_rank=None)
        module, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(share, requires_grad=False)
        model.get_submodule(module).register_parameter(leaf, parameter)
        parameters.add(parameter)
    return parameters


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh that a tensor is cut over, None for a whole one."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, cut over the ranks as the tensor is."""
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True)
    return DTensor.from_local(
        tensor.to_local().to("cpu", copy=True),
        _on_host(tensor.device_mesh),
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@cache
def _on_host(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks, exchanging what is in host memory."""
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; changes of it in place are changes of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole tensor stands what this rank holds of it, along each dimension."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    return tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of tensors that are whole, or cut over the same axes of one mesh; collective."""
    norm = nn.utils.get_total_norm([local(tensor) for tensor in tensors])
    if not tensors or not isinstance(tensors[0], DTensor):
        return norm
    square = norm.square()
    for axis, placement in enumerate(tensors[0].placements):
        if not placement.is_replicate():
            distributed.all_reduce(square, group=tensors[0].device_mesh.get_group(axis))
    return square.sqrt()


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered from all ranks; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
