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

    `shard` cuts every parameter by rows, by default over all ranks that `replicate` leaves;
    `replicate` copies that mesh (HSDP). `expert` and `sequence` are 1. `streams` are the data
    streams, a multiple of every number of ranks the run shall have.
    """

    replicate: Count = 1
    shard: Count | None = None
    expert: Count = 1
    sequence: Count = 1
    streams: Count = DEFAULT_STREAMS

    def __post_init__(self) -> None:
        for axis in ("expert", "sequence"):
            if (degree := getattr(self, axis)) != 1:
                raise ValueError(
                    f"{axis}: this axis is not available yet, got {degree}; leave it at 1 and use "
                    "shard and replicate"
                )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshShape:
    """Ranks of each axis of a mesh."""

    replicate: int = 1
    shard: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard

    def build(self, device: str) -> DeviceMesh:
        """The device mesh of all ranks on devices of a type, such as "cuda"."""
        if self.replicate == 1:
            return init_device_mesh(device, (self.shard,), mesh_dim_names=("shard",))
        sizes, names = (self.replicate, self.shard), ("replicate", "shard")
        return init_device_mesh(device, sizes, mesh_dim_names=names)


def mesh_shape(config: ParallelConfig | None, ranks: int) -> MeshShape:
    """The mesh of a recipe on so many ranks. Raises ConfigError where it does not fit."""
    config = config or ParallelConfig()
    replicate, shard = config.replicate, config.shard
    if shard is None:
        if ranks % replicate:
            raise ConfigError(
                f"parallel.replicate: {ranks} ranks cannot be divided into {replicate} copies"
            )
        shard = ranks // replicate
    if replicate * shard != ranks:
        raise ConfigError(
            f"parallel: replicate {replicate} × shard {shard} are {replicate * shard} ranks, and "
            f"there are {ranks}: start that many, or change the degrees"
        )
    return MeshShape(replicate=replicate, shard=shard)
