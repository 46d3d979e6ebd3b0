"""Replicas of the server behind one address, on one or many machines, by Ray Serve.

`deployment` imports Ray, which this module does only after it has set up its environment.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from neounify.errors import ConfigError, NeounifyError
from neounify.runtime.process import private_ray
from neounify.serve.http import HttpConfig
from neounify.serve.run import RunConfig, bound
from neounify.serve.safety.hooks import Hooks


class ReplicaError(NeounifyError, RuntimeError):
    """The replicas could not be started."""


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
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


def replica_http(config: HttpConfig) -> HttpConfig:
    """The config of each replica: without results and jobs, which a later request needs.

    It may reach a replica that does not have them.
    """
    return replace(config, result_urls=False, generate_videos=False)


def run_replicas(
    config: RunConfig,
    replicas: ReplicaConfig,
    make_hooks: Callable[[], Hooks] | None = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then refuse new requests and finish those in flight.

    `make_hooks` is called once in each replica. Raises ImportError without Ray, and ReplicaError
    when the replicas do not start, AddressError when the address is taken.
    """
    if replicas.address is None:
        with bound(config.host, config.port):
            pass  # Ray reports a taken address late, and in many lines
        os.environ.update(private_ray())
    # Ray reads the environment when it is imported.
    from neounify.serve.replicas.deployment import connected, deployed

    with (
        connected(replicas, config.log_level),
        deployed(config, replicas, make_hooks),
        _stopped_by_signals() as stopped,
    ):
        started()
        stopped.wait()


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second signal ends the process as usual."""
    stopped = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
