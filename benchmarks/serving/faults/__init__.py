"""What must hold when processes die, callers leave, too many come, or the end is asked for."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.serving.faults.check import Check, checks_table
from benchmarks.serving.faults.draining import draining
from benchmarks.serving.faults.killing import generation_killed, understanding_killed
from benchmarks.serving.faults.leaving import chat_left, painting_left
from benchmarks.serving.faults.limits import too_many_images, too_many_requests
from benchmarks.serving.faults.many import many_leave, many_signals
from benchmarks.serving.server import ServerOptions

Scenario = Callable[[ServerOptions, Path], Awaitable[list[Check]]]

LEAVERS, ROUNDS = 500, 10
"""Callers who leave, and signals of each kind to each engine."""


def scenarios(leavers: int = LEAVERS, rounds: int = ROUNDS) -> Mapping[str, Scenario]:
    """All of them by name; each starts a separate server."""
    return SINGLE | {
        "leavers": partial(many_leave, leavers),
        "kills": partial(many_signals, signal.SIGKILL, rounds),
        "stops": partial(many_signals, signal.SIGSTOP, rounds),
    }


SINGLE: dict[str, Scenario] = {
    "kill-generation": generation_killed,
    "kill-understanding": understanding_killed,
    "too-many-requests": too_many_requests,
    "too-many-images": too_many_images,
    "painting-left": painting_left,
    "chat-left": chat_left,
    "drain": draining,
}
MOST_SECONDS = 3600.0
"""Of one scenario."""


async def run_faults(
    options: ServerOptions, log: Path, chosen: Mapping[str, Scenario]
) -> list[Check]:
    """The checks of the scenarios, in turn."""
    checks: list[Check] = []
    for name, scenario in chosen.items():
        start = time.monotonic()
        results = await _run(name, scenario, options, log)
        print(f"{name}, {time.monotonic() - start:.0f} s", file=sys.stderr)
        print(checks_table(results), file=sys.stderr)
        checks += results
    return checks


async def _run(name: str, scenario: Scenario, options: ServerOptions, log: Path) -> list[Check]:
    """A scenario's checks; one that does not finish has failed."""
    try:
        return await asyncio.wait_for(scenario(options, log), MOST_SECONDS)
    except (RuntimeError, OSError, asyncio.TimeoutError, subprocess.TimeoutExpired) as error:
        seen = f"{type(error).__name__} {error}".strip()
        return [Check(scenario=name, what="finishes", passed=False, seen=seen)]
