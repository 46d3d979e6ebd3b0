"""Many callers who leave at random moments, many kills and stops: nothing else may die or stay."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.serving.driving import going_on
from benchmarks.serving.faults.check import Check, is_engine_death, tally
from benchmarks.serving.processes import engines, shared_memory
from benchmarks.serving.sending import Outcome, send
from benchmarks.serving.series import warm_up
from benchmarks.serving.server import Server, ServerOptions, running_server, until
from benchmarks.serving.soak import at_rest
from benchmarks.serving.wire import exchange
from benchmarks.serving.workload import Call, chat, edit, paint, story

TOGETHER, STAYING = 16, 3
"""Callers who leave at once, and clients beside them who stay."""
LEAVE_SECONDS, PREVIEW_SHARE = 0.6, 0.4
"""A caller leaves within that time, or, so many of them, at the first event of a stream."""
LIKELY_DEADLINE = 0.1
CLIENTS, PAUSE, LOAD_SECONDS = 4, 0.05, 0.5
SILENCE = ("--silence-seconds", "5")
STEPS = 30


async def many_leave(leavers: int, options: ServerOptions, log: Path) -> list[Check]:
    """Callers of every kind of request leave while others stay."""
    scenario = f"{leavers} callers leave at random moments"
    chance = random.Random(0)
    numbers = itertools.count()
    async with running_server(options, log) as server:
        await warm_up(server.port)
        state = await _state(server)
        async with going_on(server.port, _kinds(), clients=STAYING, pause=PAUSE) as stayed:

            async def leave_in_turn() -> None:
                while (number := next(numbers)) < leavers:
                    await _leave(server.port, number, chance)

            await asyncio.gather(*(leave_in_turn() for _ in range(TOGETHER)))
        return [
            Check(
                scenario=scenario,
                what="those who stay are answered",
                passed=len(stayed) > 0 and all(o.ok for o in stayed),
                seen=tally(stayed),
            ),
            *await _as_before(scenario, server, state, deaths=0),
        ]


async def many_signals(number: int, rounds: int, options: ServerOptions, log: Path) -> list[Check]:
    """SIGKILL or SIGSTOP to each engine in turn, with requests of every kind under way."""
    name = signal.Signals(number).name
    scenario = f"{rounds} × {name} to each engine"
    quick = replace(options, more=(*options.more, *SILENCE))
    async with running_server(quick, log) as server:
        await warm_up(server.port)
        state = await _state(server)
        pids = dict(zip(("understanding", "generation"), engines(server.pid), strict=True))
        seen = [
            await _strike(server, pids, victim, number) for _ in range(rounds) for victim in pids
        ]
        outcomes = [outcome for strike in seen for outcome in strike.outcomes]
        failed = [o for o in outcomes if not o.ok]
        ready = sorted(strike.seconds for strike in seen)
        later = [await send(server.port, call) for call in itertools.islice(_kinds(), 5)]
        return [
            Check(
                scenario=scenario,
                what="every failure is 503 with Retry-After, or that error in a stream",
                passed=len(failed) > 0 and all(map(is_engine_death, failed)),
                seen=f"{tally(failed)}; beside them {len(outcomes) - len(failed)} answered",
            ),
            Check(
                scenario=scenario,
                what="each time all is ready again, and all kinds of requests are answered",
                passed=all(o.ok for o in later),
                seen=f"after {ready[0]:.1f} to {ready[-1]:.1f} s, median "
                f"{ready[len(ready) // 2]:.1f} s; then {tally(later)}",
            ),
            *await _as_before(scenario, server, state, deaths=len(seen)),
        ]


@dataclass(frozen=True)
class _State:
    """Of a server at rest."""

    gauges: dict[str, float]
    pieces: set[str]
    restarts: float


@dataclass(frozen=True)
class _Strike:
    """One signal: the requests that were under way, and how long until all was ready again."""

    outcomes: Sequence[Outcome]
    seconds: float


async def _state(server: Server) -> _State:
    gauges = await at_rest(server)
    return _State(gauges, shared_memory(), (await server.metrics())["restarts_total"])


async def _as_before(scenario: str, server: Server, before: _State, *, deaths: int) -> list[Check]:
    gauges = await at_rest(server, before.gauges)
    restarts = (await server.metrics())["restarts_total"] - before.restarts
    await until(lambda: _gone(before.pieces), 5.0)
    left = shared_memory() - before.pieces
    return [
        Check(
            scenario=scenario,
            what="no engine died but those that were to",
            passed=restarts == deaths and await server.ready(),
            seen=f"{restarts:.0f} starts after {deaths} deaths",
        ),
        Check(
            scenario=scenario,
            what="gauges and shared memory are as before",
            passed=gauges == before.gauges and not left,
            seen=f"{len(left)} pieces in /dev/shm, "
            + ("gauges as before" if gauges == before.gauges else f"{gauges}, not {before.gauges}"),
        ),
    ]


async def _gone(before: set[str]) -> bool:
    return shared_memory() <= before


async def _leave(port: int, number: int, chance: random.Random) -> None:
    """Ask and hang up: at the first event of a stream, or after some time, or by a deadline."""
    call = _kind(number)
    if chance.random() < LIKELY_DEADLINE:
        body = {**call.body, "deadline": chance.uniform(0.05, LEAVE_SECONDS)}
        await send(port, replace(call, body=body))
        return
    first = chance.random() < PREVIEW_SHARE
    task = asyncio.ensure_future(_first_event(port, call) if first else send(port, call))
    await asyncio.wait((task,), timeout=None if first else chance.uniform(0, LEAVE_SECONDS))
    task.cancel()
    with suppress(asyncio.CancelledError, OSError, StopAsyncIteration):
        await task


async def _first_event(port: int, call: Call) -> None:
    async with exchange(port, call.path, {**call.body, "stream": True}) as answer:
        await anext(answer.events())


async def _strike(server: Server, pids: dict[str, int], victim: str, number: int) -> _Strike:
    """Signal one engine under load; `pids` then has that of its next life."""
    async with going_on(server.port, _kinds(), clients=CLIENTS, pause=PAUSE) as outcomes:
        long = asyncio.ensure_future(send(server.port, paint(0, steps=STEPS)))
        await asyncio.sleep(LOAD_SECONDS)
        start = time.monotonic()
        os.kill(pids[victim], number)
        if not await until(_down(server), 60.0):
            raise RuntimeError(f"the server stayed ready without its {victim} engine")
        await server.wait_ready()
        seconds = time.monotonic() - start
        (pids[victim],) = set(engines(server.pid)) - set(pids.values())
    return _Strike([*outcomes, await long], seconds)


def _down(server: Server) -> Callable[[], Awaitable[bool]]:
    async def down() -> bool:
        return not await server.ready()

    return down


def _kinds(first: int = 0) -> Iterator[Call]:
    return map(_kind, itertools.count(first))


def _kind(number: int) -> Call:
    """Requests of all kinds, interleaved."""
    small = {"steps": 6, "size": "64x64"}
    match number % 5:
        case 0:
            return chat(number)
        case 1:
            return paint(number, **small, stream=True, partial_images=3)
        case 2:
            return paint(number, **small, n=4, stream=True, partial_images=3)
        case 3:
            return edit(number, **small)
        case _:
            return story(number, **small)
