"""A series: requests sent in one way to a server that was started for them alone."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving.driving import closed_loop
from benchmarks.serving.processes import MemoryWatch
from benchmarks.serving.sending import Outcome, send
from benchmarks.serving.server import ServerOptions, running_server
from benchmarks.serving.stats import Summary, by_kind
from benchmarks.serving.workload import WARM_UP, Call, chat, paint

Drive = Callable[[int], Awaitable[list[Outcome]]]
"""Sends a series' requests to a port."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """What came of a series. `memory` holds (seconds since `started`, MB); peak in MB.

    `asked` is how many requests there were to send; `started` is a time of `time.monotonic`.
    """

    name: str
    clients: int
    asked: int | None
    started: float
    kinds: dict[str, Summary]
    peak_mb: float
    memory: list[tuple[float, float]] = field(repr=False)

    @property
    def cut(self) -> bool:
        """Whether time ran out before all requests had been sent."""
        return self.asked is not None and self.kinds["all"].requests < self.asked


async def run_series(
    name: str,
    clients: int,
    drive: Drive,
    *,
    options: ServerOptions,
    log: Path,
    asked: int | None = None,
) -> Series:
    """Start a server, warm it up, send, stop it."""
    async with running_server(options, log) as server:
        await warm_up(server.port)
        with MemoryWatch(server.pid) as watch:
            started = time.monotonic()
            outcomes = await drive(server.port)
    return Series(
        name=name,
        clients=clients,
        asked=asked,
        started=started,
        kinds=by_kind(outcomes),
        peak_mb=watch.peak,
        memory=[(at - started, mb) for at, mb in watch.samples],
    )


async def warm_up(port: int) -> None:
    """Have every part of the server used once. Raises RuntimeError when that fails."""
    for call in (chat(WARM_UP), chat(WARM_UP + 1), paint(WARM_UP + 2)):
        outcome = await send(port, call)
        if not outcome.ok:
            raise RuntimeError(f"a request to warm up failed: {outcome}")


def closed(calls: Sequence[Call], clients: int, seconds: float) -> Drive:
    """All the calls from a number of clients, as long as there is time."""
    return lambda port: closed_loop(port, calls, clients=clients, seconds=seconds)
