"""Callers that hang up: their work is freed within one step."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.serving.faults.check import Check
from benchmarks.serving.sending import send
from benchmarks.serving.series import warm_up
from benchmarks.serving.server import Server, ServerOptions, running_server
from benchmarks.serving.soak import at_rest
from benchmarks.serving.wire import exchange
from benchmarks.serving.workload import Call, chat, paint

STEPS, PREVIEWS, SIZE = 40, 3, "512x512"
"""An image whose steps take far longer than hanging up."""
MOST_STEPS = 2
"""The step under way when the preview arrives here, and one that may begin before word of the
disconnect has reached the engines."""
CHATS = 8
TRIED = 16
"""Chats of which the one with the longest answer is taken."""


async def painting_left(options: ServerOptions, log: Path) -> list[Check]:
    """Hang up at the first preview, which says what step it is of."""
    scenario = "caller of an image leaves"
    call = paint(0, size=SIZE, steps=STEPS, stream=True, partial_images=PREVIEWS)
    async with running_server(options, log) as server:
        await warm_up(server.port)
        idle = await at_rest(server)
        before = (await server.metrics())["gen_steps_total"]
        async with exchange(server.port, call.path, call.body) as answer:
            preview = await anext(answer.events())
        left = time.monotonic()
        after = await at_rest(server, idle)
        seconds = time.monotonic() - left
        metrics = await server.metrics()
    extra = metrics["gen_steps_total"] - before - preview["step"]
    return [
        Check(
            scenario=scenario,
            what=f"at most the step under way and the next are computed of {STEPS}",
            passed=extra <= MOST_STEPS,
            seen=f"left at step {preview['step']}, {extra:.0f} more were computed",
        ),
        _idle(scenario, idle, after, seconds),
    ]


async def chat_left(options: ServerOptions, log: Path) -> list[Check]:
    """Hang up on several long answers at their first words."""
    scenario = "callers of chats leave"
    async with running_server(options, log) as server:
        await warm_up(server.port)
        answers = [(await send(server.port, chat(n))).tokens for n in range(TRIED)]
        whole = max(answers)
        call = chat(answers.index(whole))
        idle = await at_rest(server)
        before = (await server.metrics())["und_written_tokens_total"]
        async with AsyncExitStack() as stack:
            await asyncio.gather(*(_first_words(server, call, stack) for _ in range(CHATS)))
        left = time.monotonic()
        after = await at_rest(server, idle)
        seconds = time.monotonic() - left
        metrics = await server.metrics()
    written = metrics["und_written_tokens_total"] - before
    return [
        Check(
            scenario=scenario,
            what="less than half of what they would have been is written",
            passed=written < CHATS * whole / 2,
            seen=f"{written:.0f} of {CHATS * whole} tokens",
        ),
        _idle(scenario, idle, after, seconds),
    ]


async def _first_words(server: Server, call: Call, stack: AsyncExitStack) -> None:
    answer = await stack.enter_async_context(exchange(server.port, call.path, call.body))
    await anext(answer.events())


def _idle(
    scenario: str, before: dict[str, float], after: dict[str, float], seconds: float
) -> Check:
    return Check(
        scenario=scenario,
        what="the gauges are again those of a server at rest",
        passed=after == before,
        seen=f"after {seconds:.2f} s" if after == before else f"{after}, before {before}",
    )
