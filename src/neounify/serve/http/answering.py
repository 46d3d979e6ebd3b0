"""Between routes and engines: one request's events, measured, and closed when nobody listens."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing

from prometheus_client import Histogram

from neounify.pipeline.chatting import ChatRequest
from neounify.pipeline.interleaving import InterleaveRequest
from neounify.serve.events import Answering, Finished, ServiceEvent, ServiceRequest
from neounify.serve.http.pump import Pump


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
    async with aclosing(Pump(sources)) as pump:
        while (item := await pump.next()) is not None:
            yield item
