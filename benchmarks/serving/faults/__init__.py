"""What must hold when processes die, callers leave, too many come, or the end is asked for."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.serving.faults.check import Check
from benchmarks.serving.faults.draining import draining
from benchmarks.serving.faults.killing import generation_killed, understanding_killed
from benchmarks.serving.faults.leaving import chat_left, painting_left
from benchmarks.serving.faults.limits import too_many_images, too_many_requests
from benchmarks.serving.server import ServerOptions

Scenario = Callable[[ServerOptions, Path], Awaitable[list[Check]]]

SCENARIOS: Mapping[str, Scenario] = {
    "kill-generation": generation_killed,
    "kill-understanding": understanding_killed,
    "too-many-requests": too_many_requests,
    "too-many-images": too_many_images,
    "painting-left": painting_left,
    "chat-left": chat_left,
    "drain": draining,
}
"""Each starts a server of its own."""


async def run_faults(options: ServerOptions, log: Path, names: Iterable[str]) -> list[Check]:
    """The checks of the scenarios of those names, in turn."""
    checks: list[Check] = []
    for name in names:
        print(name, file=sys.stderr)
        checks += await SCENARIOS[name](options, log)
    return checks
