"""kill -9 of one engine under load: whose requests fail, how, and for how long."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.serving.driving import going_on
from benchmarks.serving.faults.check import Check, is_engine_death, tally
from benchmarks.serving.processes import engines
from benchmarks.serving.sending import Outcome, send
from benchmarks.serving.series import warm_up
from benchmarks.serving.server import Server, ServerOptions, running_server, until
from benchmarks.serving.workload import Call, chat, paint

CHATTERS, PAINTINGS = 4, 3
PAUSE = 0.05
"""Of the chatters, so that refusals while an engine is down come in countable numbers."""
UNDERSTANDING, GENERATION = 0, 1
"""Places in the order in which the server starts its engines."""
LONG = {"steps": 200, "size": "128x128"}
BEFORE_SECONDS, AFTER_SECONDS = 0.5, 10.0
"""Seconds of load before the kill, and at most until the first answer after the restart."""


async def generation_killed(options: ServerOptions, log: Path) -> list[Check]:
    """Running images fail with 503, text continues undisturbed."""
    scenario = "generation process killed"
    async with running_server(options, log) as server:
        await warm_up(server.port)
        killed, chats, images = await _under_load(server, GENERATION)
        later = await send(server.port, paint(0))
        restarts = (await server.metrics())["restarts_total"]
    return [
        Check(
            scenario=scenario,
            what="images under way fail with 503 and Retry-After",
            passed=len(images) == PAINTINGS and all(map(is_engine_death, images)),
            seen=tally(images),
        ),
        Check(
            scenario=scenario,
            what="images asked for meanwhile are refused with 503 and Retry-After",
            passed=is_engine_death(killed.meanwhile),
            seen=tally([killed.meanwhile]),
        ),
        Check(
            scenario=scenario,
            what="chats continue, also while the engine is down",
            passed=killed.among(chats) > 0 and all(o.ok for o in chats),
            seen=f"{tally(chats)}; {killed.among(chats)} began while it was down",
        ),
        _recovered(scenario, killed, later, restarts),
    ]


async def understanding_killed(options: ServerOptions, log: Path) -> list[Check]:
    """Running text fails with 503, running images are finished."""
    scenario = "understanding process killed"
    async with running_server(options, log) as server:
        await warm_up(server.port)
        killed, chats, images = await _under_load(server, UNDERSTANDING)
        later = await send(server.port, paint(0))
        restarts = (await server.metrics())["restarts_total"]
    failed = [o for o in chats if not o.ok]
    after = [o for o in chats if o.start > killed.ready]
    return [
        Check(
            scenario=scenario,
            what="chats under way and meanwhile fail with 503 and Retry-After, "
            "or with that error in their stream",
            passed=len(failed) > 0 and all(map(is_engine_death, failed)),
            seen=tally(failed),
        ),
        Check(
            scenario=scenario,
            what="chats before and afterwards are answered",
            passed=len(after) > 0 and all(o.ok for o in chats if not killed.touches(o)),
            seen=f"{tally(o for o in chats if not killed.touches(o))}; {len(after)} afterwards",
        ),
        Check(
            scenario=scenario,
            what="running images are finished",
            passed=len(images) == PAINTINGS and all(o.ok for o in images),
            seen=tally(images),
        ),
        _recovered(scenario, killed, later, restarts),
    ]


class _Killed:
    """When an engine was killed and ready again, and what was answered in between."""

    def __init__(self, at: float, ready: float, meanwhile: Outcome) -> None:
        self.at, self.ready, self.meanwhile = at, ready, meanwhile

    def among(self, outcomes: Sequence[Outcome]) -> int:
        """How many began while the engine was down."""
        return sum(self.at < o.start < self.ready for o in outcomes)

    def touches(self, outcome: Outcome) -> bool:
        """Whether it was under way at a time when the engine was down."""
        return outcome.start <= self.ready and outcome.end >= self.at


async def _under_load(server: Server, victim: int) -> tuple[_Killed, list[Outcome], list[Outcome]]:
    """Kill an engine while images are generated and chats come and go.

    Gives what happened, and the outcomes of the chats and of the images.
    """
    images = [asyncio.create_task(send(server.port, paint(n, **LONG))) for n in range(PAINTINGS)]
    calls = map(_by_turns, itertools.count())
    async with going_on(server.port, calls, clients=CHATTERS, pause=PAUSE) as chats:
        await _all_painting(server)
        await asyncio.sleep(BEFORE_SECONDS)
        os.kill(engines(server.pid)[victim], signal.SIGKILL)
        at = time.monotonic()
        if not await until(lambda: _not(server.ready()), 10.0):
            raise RuntimeError("the server stayed ready after one of its engines was killed")
        meanwhile = await send(server.port, paint(0))
        await server.wait_ready()
        killed = _Killed(at, time.monotonic(), meanwhile)
        await until(partial(_answered_since, chats, killed.ready), AFTER_SECONDS)
    return killed, chats, list(await asyncio.gather(*images))


def _by_turns(number: int) -> Call:
    """Chats, every other one streamed."""
    return chat(number, stream=number % 2 == 0)


async def _all_painting(server: Server) -> None:
    async def generating() -> bool:
        return (await server.metrics()).get("gen_images", 0) >= PAINTINGS

    if not await until(generating, 60.0):
        raise RuntimeError("the images did not come under way")


async def _answered_since(outcomes: Sequence[Outcome], start: float) -> bool:
    return any(o.start > start for o in outcomes)


async def _not(answer: object) -> bool:
    return not await answer  # type: ignore[misc]


def _recovered(scenario: str, killed: _Killed, later: Outcome, restarts: float) -> Check:
    return Check(
        scenario=scenario,
        what="it is restarted, once, and generates images",
        passed=later.ok and restarts == 1,
        seen=f"ready after {killed.ready - killed.at:.1f} s, {restarts:.0f} restart, "
        f"then {tally([later])}",
    )
