"""Between routes and engines: one request's events, measured, and closed when nobody listens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing

from prometheus_client import Histogram

from neounify.pipeline.chatting import ChatRequest
from neounify.pipeline.interleaving import InterleaveRequest
from neounify.serve.events import Answering, Finished, ServiceEvent, ServiceRequest


def task_of(request: ServiceRequest) -> str:
    """The label of its kind in metrics and facts."""
    if isinstance(request, ChatRequest):
        return "chat"
    if isinstance(request, InterleaveRequest):
        return "interleave"
    return "edit" if request.images else "generate"


async def answer(
    service: Answering,
    request: ServiceRequest,
    *,
    previews: int,
    deadline: float,
    first_token: Histogram,
) -> AsyncGenerator[ServiceEvent]:
    """The events of one request; closing this closes the engine's own iterator at once."""
    started = time.perf_counter()
    seen = False
    async with AsyncExitStack() as stack:
        events = service.answer(request, previews=previews, deadline=deadline)
        if isinstance(events, AsyncGenerator):
            await stack.enter_async_context(aclosing(events))
        async for event in events:
            if not seen and not isinstance(event, Finished):
                first_token.labels(task_of(request)).observe(time.perf_counter() - started)
                seen = True
            yield event


async def merge(
    sources: Sequence[AsyncIterator[ServiceEvent]],
) -> AsyncGenerator[tuple[int, ServiceEvent]]:
    """(number of the source, event) as they come; one source's error ends and closes them all."""
    queue: asyncio.Queue[tuple[int, ServiceEvent] | BaseException | None] = asyncio.Queue(1)

    async def pump(number: int, source: AsyncIterator[ServiceEvent]) -> None:
        try:
            async with AsyncExitStack() as stack:
                if isinstance(source, AsyncGenerator):
                    await stack.enter_async_context(aclosing(source))
                async for event in source:
                    await queue.put((number, event))
        except Exception as error:  # handed over to whoever reads the queue
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.ensure_future(pump(n, source)) for n, source in enumerate(sources)]
    try:
        open_sources = len(pumps)
        while open_sources:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_sources -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
