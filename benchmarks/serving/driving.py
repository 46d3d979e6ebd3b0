"""Many requests: a number of clients that each wait for their answer, or arrivals by the clock."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import asynccontextmanager

from benchmarks.serving.sending import Outcome, send
from benchmarks.serving.workload import Call


async def closed_loop(
    port: int, calls: Iterable[Call], *, clients: int, seconds: float, pause: float = 0.0
) -> list[Outcome]:
    """`clients` share the calls; each sends its next one `pause` seconds after an answer.

    After `seconds` no more are sent; those under way are waited for.
    """
    left, outcomes = iter(calls), list[Outcome]()
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        await asyncio.sleep(pause * number / clients)
        while time.monotonic() < end and (call := next(left, None)) is not None:
            outcomes.append(await send(port, call))
            await asyncio.sleep(pause)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return outcomes


async def open_loop(
    port: int, calls: Iterator[Call], *, rate: float, seconds: float, seed: int = 0
) -> list[Outcome]:
    """Calls at random times, `rate` a second on average, whether or not others are answered.

    The times are a Poisson process and the same for the same seed. Latencies count from when
    a call was due.
    """
    chance = random.Random(seed)
    due = start = time.monotonic()
    tasks: list[asyncio.Task[Outcome]] = []
    while (due := due + chance.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(send(port, next(calls), due)))
    return list(await asyncio.gather(*tasks))


@asynccontextmanager
async def going_on(
    port: int, calls: Iterator[Call], *, clients: int, pause: float = 0.0
) -> AsyncGenerator[list[Outcome]]:
    """Clients that send call after call until the block is left; then their last are awaited.

    The list grows while the block runs.
    """
    outcomes: list[Outcome] = []
    stopping = asyncio.Event()

    async def client() -> None:
        while not stopping.is_set():
            outcomes.append(await send(port, next(calls)))
            await asyncio.sleep(pause)

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    try:
        yield outcomes
    finally:
        stopping.set()
        await asyncio.gather(*tasks)
