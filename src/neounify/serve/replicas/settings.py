"""How many replicas there are, and what each may use."""

from __future__ import annotations

from dataclasses import dataclass

from neounify.errors import ConfigError, NeounifyError


class ReplicaError(NeounifyError, RuntimeError):
    """The replicas could not be started."""


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """`count` replicas, with `cpus` cores and `gpus` graphics cards set aside for each.

    `address` is that of a Ray cluster which runs already, "auto" for the one of this machine;
    without one, Ray runs on this machine for as long as the server does. Raises ConfigError for
    less than one replica, and for less than no cores or cards.
    """

    count: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"there must be at least 1 replica, got {self.count}")
        if self.cpus < 0 or self.gpus < 0:
            raise ConfigError(f"a replica cannot have {self.cpus:g} cores and {self.gpus:g} GPUs")
