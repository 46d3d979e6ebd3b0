"""Mesh of a run: how many ranks each axis has, from the `[parallel]` table of a recipe."""

from __future__ import annotations

from dataclasses import fields

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
    other parameters as `shard` does. `sequence` cuts the rows of a pack, and all parameters as
    `shard` does. `streams` are the data streams, a multiple of every number of ranks over
    `sequence` that the run shall have.
    """

    replicate: Count = 1
    shard: Count | None = None
    expert: Count = 1
    sequence: Count = 1
    streams: Count = DEFAULT_STREAMS

    def __post_init__(self) -> None:
        if self.expert > 1 and self.sequence > 1:
            raise ValueError(
                f"expert ({self.expert}) and sequence ({self.sequence}) are not available "
                "together: leave one of them at 1"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshShape:
    """Ranks of each axis of a mesh; those of one pack, `sequence`, are neighbours."""

    replicate: int = 1
    shard: int = 1
    expert: int = 1
    sequence: int = 1

    def __str__(self) -> str:
        degrees = {item.name: getattr(self, item.name) for item in fields(self)}
        always = ("replicate", "shard")
        return " × ".join(f"{n} {d}" for n, d in degrees.items() if d > 1 or n in always)

    @property
    def ranks(self) -> int:
        return self.replicate * self.cuts

    @property
    def packs(self) -> int:
        """Packs that are computed at the same time."""
        return self.ranks // self.sequence

    @property
    def cuts(self) -> int:
        """Ranks that a parameter is cut over, other than experts."""
        return self.shard * self.expert * self.sequence

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


def mesh_shape(config: ParallelConfig | None, ranks: int, *, cut: bool = True) -> MeshShape:
    """The mesh of a recipe on so many ranks. Raises ConfigError where it does not fit.

    Without `cut`, every rank holds the whole model by default.
    """
    config = config or ParallelConfig()
    replicate, shard, expert = config.replicate, config.shard, config.expert
    sequence = config.sequence
    if ranks % sequence:
        raise ConfigError(
            f"parallel.sequence: {ranks} ranks cannot be divided into groups of {sequence}"
        )
    if shard is None and not cut and expert == 1:
        replicate, shard = ranks // sequence, 1
    if shard is None:
        packs = ranks // sequence
        if packs % replicate:
            raise ConfigError(
                f"parallel.replicate: {packs} ranks cannot be divided into {replicate} copies"
            )
        if packs // replicate % expert:
            raise ConfigError(
                f"parallel.expert: {packs // replicate} ranks cannot be divided into groups of "
                f"{expert}"
            )
        shard = packs // replicate // expert
    shape = MeshShape(replicate=replicate, shard=shard, expert=expert, sequence=sequence)
    if shape.ranks != ranks:
        raise ConfigError(
            f"parallel: {shape} are {shape.ranks} ranks, and there are {ranks}: start "
            f"{shape.ranks}, or change the degrees"
        )
    return shape
