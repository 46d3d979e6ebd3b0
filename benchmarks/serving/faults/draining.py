"""SIGTERM: what was accepted is finished, nothing new is taken, nothing is left behind."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

from benchmarks.serving.faults.check import Check, tally
from benchmarks.serving.processes import alive, shared_memory, tree
from benchmarks.serving.sending import send
from benchmarks.serving.series import warm_up
from benchmarks.serving.server import STOP_SECONDS, ServerOptions, running_server, until
from benchmarks.serving.workload import chat, paint

PAINTINGS, CHATS = 3, 3
LONG = {"steps": 120}
GONE_SECONDS = 5.0
"""How long the machine may take to clear up; other programs' pieces go away by themselves too."""


async def draining(options: ServerOptions, log: Path) -> list[Check]:
    """SIGTERM with requests under way."""
    scenario = "SIGTERM"
    shared = shared_memory()
    async with running_server(options, log) as server:
        await warm_up(server.port)
        calls = [
            *(paint(n, **LONG) for n in range(PAINTINGS)),
            *(chat(n, stream=n % 2 == 0) for n in range(CHATS)),
        ]
        tasks = [asyncio.create_task(send(server.port, call)) for call in calls]

        async def accepted() -> bool:
            done = sum(task.done() for task in tasks)
            return done + (await server.metrics())["requests"] >= len(tasks)

        await until(accepted, 30.0)
        members = tree(server.pid)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        new = await send(server.port, chat(0))
        outcomes = await asyncio.gather(*tasks)
        answered = time.monotonic()
        code = await asyncio.to_thread(server.process.wait, STOP_SECONDS)
        seconds = time.monotonic() - answered
        # What is looked at must not be cleared up by leaving the block.
        gone = await until(lambda: _all_ended(members), GONE_SECONDS)
        cleared = await until(lambda: _cleared(shared), GONE_SECONDS)
    return [
        Check(
            scenario=scenario,
            what="what was accepted is finished",
            passed=all(o.ok for o in outcomes),
            seen=tally(outcomes),
        ),
        Check(
            scenario=scenario,
            what="nothing new is taken",
            passed=new.status in (0, 503),
            seen=tally([new]),
        ),
        Check(
            scenario=scenario,
            what="the exit code is 0",
            passed=code == 0,
            seen=f"{code}, {seconds:.1f} s after the last answer",
        ),
        Check(
            scenario=scenario,
            what="no process is left",
            passed=gone,
            seen=f"{sum(map(alive, members))} of {len(members)}",
        ),
        Check(
            scenario=scenario,
            what="no shared memory is left",
            passed=cleared,
            seen=f"{len(shared_memory() - shared)} pieces in /dev/shm",
        ),
    ]


async def _all_ended(members: list[int]) -> bool:
    return not any(map(alive, members))


async def _cleared(before: set[str]) -> bool:
    return shared_memory() <= before
