"""Settings of replicas: their number and resources."""

from __future__ import annotations

from dataclasses import dataclass

from neounify.errors import ConfigError, NeounifyError


class ReplicaError(NeounifyError, RuntimeError):
    """The replicas could not be started."""


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """`count` replicas, with `cpus` cores and `gpus` GPUs reserved for each.

    `address` is that of a running Ray cluster, "auto" for the one of this machine; without one,
    Ray is started on this machine and stopped with the server. Raises ConfigError for less than one
    replica, and for negative numbers of cores or GPUs.
    """

    count: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count must be at least 1, got {self.count}")
        if self.cpus < 0 or self.gpus < 0:
            raise ConfigError(
                f"cpus and gpus must be at least 0, got {self.cpus:g} and {self.gpus:g}"
            )
