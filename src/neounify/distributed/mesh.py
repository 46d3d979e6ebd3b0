"""Mesh of a run: how many ranks each axis has, from the `[parallel]` table of a recipe."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from neounify.config.ranges import STRICT, Count
from neounify.errors import ConfigError

DEFAULT_STREAMS = 64
"""Data streams of a recipe with a `[parallel]` table: a multiple of most numbers of ranks."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """The `[parallel]` table: degrees of the axes, whose product is the number of ranks.

    `shard` cuts every parameter by rows, by default over all ranks that the others leave;
    `replicate` copies that mesh (HSDP). `expert` deals out the experts of a layer, and cuts all
    other parameters as `shard` does. `sequence` is 1. `streams` are the data streams, a multiple of
    every number of ranks the run shall have.
    """

    replicate: Count = 1
    shard: Count | None = None
    expert: Count = 1
    sequence: Count = 1
    streams: Count = DEFAULT_STREAMS

    def __post_init__(self) -> None:
        if self.sequence != 1:
            raise ValueError(
                f"sequence: this axis is not available yet, got {self.sequence}; leave it at 1 and "
                "use shard and replicate"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshShape:
    """Ranks of each axis of a mesh."""

    replicate: int = 1
    shard: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.cuts

    @property
    def cuts(self) -> int:
        """Ranks that a parameter is cut over, other than experts."""
        return self.shard * self.expert

    def build(self, device: str) -> DeviceMesh:
        """The mesh of all parameters but experts, on devices of a type such as "cuda"."""
        if self.replicate == 1:
            return init_device_mesh(device, (self.cuts,), mesh_dim_names=("shard",))
        sizes, names = (self.replicate, self.cuts), ("replicate", "shard")
        return init_device_mesh(device, sizes, mesh_dim_names=names)

    def build_experts(self, device: str) -> DeviceMesh:
        """The mesh of the experts: ranks of `expert` stand beside each other, in one node."""
        sizes = (self.replicate, self.shard, self.expert)
        return init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard", "expert"))


def mesh_shape(config: ParallelConfig | None, ranks: int) -> MeshShape:
    """The mesh of a recipe on so many ranks. Raises ConfigError where it does not fit."""
    config = config or ParallelConfig()
    replicate, shard, expert = config.replicate, config.shard, config.expert
    if shard is None:
        if ranks % replicate:
            raise ConfigError(
                f"parallel.replicate: {ranks} ranks cannot be divided into {replicate} copies"
            )
        if ranks // replicate % expert:
            raise ConfigError(
                f"parallel.expert: {ranks // replicate} ranks cannot be divided by {expert}"
            )
        shard = ranks // replicate // expert
    shape = MeshShape(replicate=replicate, shard=shard, expert=expert)
    if shape.ranks != ranks:
        degrees = f"replicate {replicate} × shard {shard}"
        if expert > 1:
            degrees += f" × expert {expert}"
        raise ConfigError(
            f"parallel: {degrees} are {shape.ranks} ranks, and there are {ranks}: start that many, "
            "or change the degrees"
        )
    return shape
