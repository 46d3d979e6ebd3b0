"""A moderate mix for minutes: constant memory, no failures, an idle server at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.serving.driving import closed_loop
from benchmarks.serving.processes import MemoryWatch
from benchmarks.serving.series import warm_up
from benchmarks.serving.server import Server, ServerOptions, running_server, until
from benchmarks.serving.stats import Summary, by_kind, slope
from benchmarks.serving.workload import all_mixed

FIT_AFTER = 60.0
SLOPE_AIM = 1.0
"""MB a minute."""
SETTLE_SECONDS, REST_SECONDS = 2.0, 10.0
IDLE_GAUGES = (
    *("requests", "image_tokens", "und_waiting", "und_reading", "und_writing"),
    *("und_cache_used", "gen_images"),
)


@dataclass(frozen=True, kw_only=True)
class SoakSettings:
    """`clients` each wait `pause` seconds between an answer and their next request."""

    minutes: float = 10.0
    clients: int = 4
    pause: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Soak:
    """`slope` in MB a minute, fitted from `fitted_from` seconds on; samples are (s, MB)."""

    kinds: dict[str, Summary]
    slope: float
    fitted_from: float
    peak_mb: float
    idle_before: dict[str, float]
    idle_after: dict[str, float]
    memory: list[tuple[float, float]] = field(repr=False)


async def run_soak(settings: SoakSettings, options: ServerOptions, log: Path) -> Soak:
    """Start a server, load it for that long, and wait until it is idle."""
    seconds = settings.minutes * 60
    async with running_server(options, log) as server:
        await warm_up(server.port)
        before = await at_rest(server)
        with MemoryWatch(server.pid) as watch:
            started = time.monotonic()
            outcomes = await closed_loop(
                server.port,
                all_mixed(),
                clients=settings.clients,
                seconds=seconds,
                pause=settings.pause,
            )
        after = await at_rest(server, before)
    memory = [(at - started, mb) for at, mb in watch.samples]
    fitted_from = min(FIT_AFTER, seconds / 3)
    return Soak(
        kinds=by_kind(outcomes),
        slope=slope([(at / 60, mb) for at, mb in memory if at >= fitted_from]),
        fitted_from=fitted_from,
        peak_mb=watch.peak,
        idle_before=before,
        idle_after=after,
        memory=memory,
    )


async def at_rest(server: Server, like: Mapping[str, float] | None = None) -> dict[str, float]:
    """The gauges, once they are as in `like` or after `REST_SECONDS`; without it, after a while."""
    gauges: dict[str, float] = {}

    async def resting() -> bool:
        nonlocal gauges
        metrics = await server.metrics()
        gauges = {name: metrics.get(name, 0.0) for name in IDLE_GAUGES}
        return gauges == like

    if like is None:
        await asyncio.sleep(SETTLE_SECONDS)
        await resting()
    else:
        await until(resting, REST_SECONDS)
    return gauges


def figures(soak: Soak, options: ServerOptions) -> list[Figure]:
    """The results against their aims."""
    errors = sum(soak.kinds["all"].errors.values())
    rested = soak.idle_after == soak.idle_before
    return [
        Figure(
            name="slope of resident memory",
            value=soak.slope,
            unit="MB/min",
            aim=f"at most {SLOPE_AIM:g}",
            met=soak.slope <= SLOPE_AIM,
            note=f"peak {soak.peak_mb:.0f} MB",
            dtype=options.dtype,
            mode=options.mode,
        ),
        Figure(
            name="requests that failed",
            value=errors,
            unit=f"of {soak.kinds['all'].requests}",
            aim="0",
            met=errors == 0,
            dtype=options.dtype,
            mode=options.mode,
        ),
        Figure(
            name="share of the cache in use at rest",
            value=soak.idle_after["und_cache_used"],
            unit="",
            aim="as before",
            met=rested,
            note=f"before {soak.idle_before['und_cache_used']:.3g}, all other gauges "
            + ("as before" if rested else f"{soak.idle_after}"),
            dtype=options.dtype,
            mode=options.mode,
        ),
    ]
