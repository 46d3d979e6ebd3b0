"""More requests, and more images, than the server's limits allow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.serving.faults.check import Check, is_refusal, tally
from benchmarks.serving.sending import Outcome, send
from benchmarks.serving.series import warm_up
from benchmarks.serving.server import ServerOptions, running_server
from benchmarks.serving.workload import Call, chat, paint

REQUESTS, IMAGES = 4, 2
SIDE, IMAGE_TOKENS = 64, 16
"""Of an image of the bundled model."""
TIMES = 3
"""How many times more than the limit are sent at once."""


async def too_many_requests(options: ServerOptions, log: Path) -> list[Check]:
    """Three times as many at once as are allowed."""
    calls = [paint(n) if n % 2 else chat(n) for n in range(TIMES * REQUESTS)]
    limit = ("--requests", str(REQUESTS))
    return await _flooded("too many requests", calls, REQUESTS, options, limit, log)


async def too_many_images(options: ServerOptions, log: Path) -> list[Check]:
    """Three times as many images at once as are allowed, by their tokens."""
    calls = [paint(n, size=f"{SIDE}x{SIDE}") for n in range(TIMES * IMAGES)]
    limit = ("--image-tokens", str(IMAGES * IMAGE_TOKENS))
    return await _flooded("too many images", calls, IMAGES, options, limit, log)


async def _flooded(
    scenario: str,
    calls: Sequence[Call],
    allowed: int,
    options: ServerOptions,
    limit: tuple[str, ...],
    log: Path,
) -> list[Check]:
    small = replace(options, more=(*options.more, *limit))
    async with running_server(small, log) as server:
        await warm_up(server.port)
        outcomes = await asyncio.gather(*(send(server.port, call) for call in calls))
        later = await send(server.port, calls[0])
    refused = [o for o in outcomes if o.status == 429]
    accepted = [o for o in outcomes if o.status != 429]
    return [
        Check(
            scenario=scenario,
            what="what is over the limit is refused with 429 and Retry-After",
            passed=bool(refused) and all(is_refusal(o, 429) for o in refused),
            seen=f"{tally(refused)}; {' '.join(limit)}",
        ),
        _accepted(scenario, accepted, allowed),
        Check(
            scenario=scenario,
            what="afterwards requests are answered as before",
            passed=later.ok,
            seen=tally([later]),
        ),
    ]


def _accepted(scenario: str, accepted: Sequence[Outcome], allowed: int) -> Check:
    return Check(
        scenario=scenario,
        what="what was accepted finishes",
        passed=len(accepted) >= allowed and all(o.ok for o in accepted),
        seen=tally(accepted),
    )
