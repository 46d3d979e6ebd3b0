"""Between routes and engines: one request's events, measured, and closed when nobody listens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing

from prometheus_client import Histogram

from neounify.pipeline.chatting import ChatRequest, CompletionRequest
from neounify.pipeline.interleaving import InterleaveRequest
from neounify.serve.events import Answering, Finished, PromptRead, ServiceEvent, ServiceRequest
from neounify.serve.http.pump import Pump


def task_of(request: ServiceRequest) -> str:
    """The label of its kind in metrics and facts."""
    if isinstance(request, ChatRequest):
        return "chat"
    if isinstance(request, CompletionRequest):
        return "complete"
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
            if not seen and not isinstance(event, PromptRead | Finished):
                first_token.labels(task_of(request)).observe(time.perf_counter() - started)
                seen = True
            yield event


async def answers_in_groups(
    groups: Sequence[Sequence[Callable[[], AsyncGenerator[ServiceEvent]]]],
) -> AsyncGenerator[tuple[int, ServiceEvent]]:
    """(number of the answer, event) of answers to several prompts, several to each.

    The answers of a group have one prompt: the first reads it, the others begin once it has been
    read, so that they find it in the cache. One answer's error ends them all.
    """
    sources: list[AsyncGenerator[ServiceEvent]] = []
    for first, *others in groups:
        read = asyncio.Event()
        sources.append(_telling(first, read))
        sources += [_after(other, read) for other in others]
    if len(sources) == 1:
        async with aclosing(sources[0]) as events:
            async for event in events:
                yield 0, event
        return
    async with aclosing(merge(sources)) as merged:
        async for item in merged:
            yield item


async def _telling(
    answer: Callable[[], AsyncGenerator[ServiceEvent]], read: asyncio.Event
) -> AsyncGenerator[ServiceEvent]:
    async with aclosing(answer()) as events:
        async for event in events:
            if isinstance(event, PromptRead | Finished):
                read.set()
            yield event


async def _after(
    answer: Callable[[], AsyncGenerator[ServiceEvent]], read: asyncio.Event
) -> AsyncGenerator[ServiceEvent]:
    await read.wait()
    async with aclosing(answer()) as events:
        async for event in events:
            yield event


async def merge(
    sources: Sequence[AsyncIterator[ServiceEvent]],
) -> AsyncGenerator[tuple[int, ServiceEvent]]:
    """(number of the source, event) as they come; one source's error ends and closes them all."""
    async with aclosing(Pump(sources)) as pump:
        while (item := await pump.next()) is not None:
            yield item
