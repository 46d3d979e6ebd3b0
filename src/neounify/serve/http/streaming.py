"""Events of requests on their way to the client: merged, as server-sent events, as JSON.

Base64, JSON and lists of log-probabilities take about 10 ms of a processor per MB, during which an
event loop answers nothing else; a change of threads takes about 0.1 ms. So large bodies are
rendered in threads and small ones on the event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, Generic, TypeVar

from prometheus_client import Histogram
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from neounify.serve.client import within
from neounify.serve.http.errors import INTERNAL, to_api_error
from neounify.serve.service import Service, ServiceRequest
from neounify.tasks.chat import ChatRequest, CompletionRequest
from neounify.tasks.events import Finished, PromptRead, TaskEvent
from neounify.tasks.interleave import InterleaveRequest

Item = TypeVar("Item")


EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
"""The media type of an answer with `stream`, for the API's description."""
DONE = b"data: [DONE]\n\n"
ALIVE = b": working\n\n"
"""A comment, which clients pass over; proxies close connections that stay silent."""
SILENCE_SECONDS = 15.0
_log = logging.getLogger(__name__)
Result = TypeVar("Result")
INLINE_BYTES = 64 * 1024
"""Bodies up to this are made on the event loop."""


class MergedStreams(Generic[Item]):
    """Several async iterators run as tasks, each at most two items ahead, their items in order.

    To be closed with `aclose`.
    """

    def __init__(self, sources: Sequence[AsyncIterator[Item]]) -> None:
        self._queue: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue(1)
        self._tasks = [asyncio.ensure_future(self._run(n, s)) for n, s in enumerate(sources)]
        self._open = len(self._tasks)

    async def next(self) -> tuple[int, Item] | None:
        """(number of the source, item); None once all have ended.

        Raises what a source raised; that ends them all.
        """
        while self._open:
            item = await self._queue.get()
            if isinstance(item, Exception):
                self._open = 0
                raise item
            if item is not None:
                return item
            self._open -= 1
        return None

    async def aclose(self) -> None:
        """End the sources, wherever they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, number: int, source: AsyncIterator[Item]) -> None:
        try:
            async with AsyncExitStack() as stack:
                if isinstance(source, AsyncGenerator):
                    await stack.enter_async_context(aclosing(source))
                async for item in source:
                    await self._queue.put((number, item))
        except Exception as error:  # raised again by `next`
            await self._queue.put(error)
        else:
            await self._queue.put(None)


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event as it goes over the wire."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class AnswerModel(BaseModel):
    """Part of an answer, for the API's description; tests check real answers against it."""

    model_config = ConfigDict(extra="forbid")


class EventStream(Response):
    """Response that sends `chunks`, and closes them at their end, an error or a disconnect."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes | None, chunks: MergedStreams[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._chunks = first, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._chunks):
            await send(start)
            chunk = self._first
            while chunk is not None:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # Sending to a closed connection does not wait, and the watch needs its turn.
                await asyncio.sleep(0)
                chunk = await self._next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes | None:
        try:
            return await _next_within(self._chunks)
        except Exception as error:
            api_error = to_api_error(error)
            if api_error is INTERNAL:
                _log.exception("an answer broke off while it was streamed")
            return sse(api_error.body(), "error")


async def start_stream(source: AsyncGenerator[bytes]) -> EventStream:
    """The response of `source`, after its first chunk or SILENCE_SECONDS.

    So errors before the first chunk are raised here and get their HTTP status.
    """
    chunks = MergedStreams([source])
    try:
        first = await _next_within(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks)


async def _next_within(chunks: MergedStreams[bytes]) -> bytes | None:
    """The next chunk, or a comment after SILENCE_SECONDS; None at the end."""
    try:
        item = await within(chunks.next(), SILENCE_SECONDS)
    except TimeoutError:
        return ALIVE
    return None if item is None else item[1]


async def off_loop(work: Callable[[], Result], size: int) -> Result:
    """The result of `work`, which makes about `size` bytes; in a thread above INLINE_BYTES."""
    return work() if size <= INLINE_BYTES else await asyncio.to_thread(work)


async def json_response(content: Callable[[], Mapping[str, Any]], size: int) -> JSONResponse:
    """The JSON response of `content`, of about `size` bytes."""
    return await off_loop(lambda: JSONResponse(content()), size)


async def sse_of(
    content: Callable[[], Mapping[str, Any]], size: int, event: str | None = None
) -> bytes:
    """The server-sent event of `content`, of about `size` bytes."""
    return await off_loop(lambda: sse(content(), event), size)


def task_of(request: ServiceRequest) -> str:
    """The name of the request's task in metrics and image metadata."""
    if isinstance(request, ChatRequest):
        return "chat"
    if isinstance(request, CompletionRequest):
        return "complete"
    if isinstance(request, InterleaveRequest):
        return "interleave"
    return "edit" if request.images else "generate"


async def answer(
    service: Service,
    request: ServiceRequest,
    *,
    previews: int,
    deadline: float,
    first_token: Histogram,
) -> AsyncGenerator[TaskEvent]:
    """The events of one request; closing this closes the service's iterator at once.

    `previews` is how many previews of each image are wanted, `deadline` in seconds from now.
    """
    started = time.perf_counter()
    is_measured = False
    async with AsyncExitStack() as stack:
        events = service.answer(request, previews=previews, deadline=deadline)
        if isinstance(events, AsyncGenerator):
            await stack.enter_async_context(aclosing(events))
        async for event in events:
            if not is_measured and not isinstance(event, PromptRead | Finished):
                first_token.labels(task_of(request)).observe(time.perf_counter() - started)
                is_measured = True
            yield event


async def answers_in_groups(
    groups: Sequence[Sequence[Callable[[], AsyncGenerator[TaskEvent]]]],
) -> AsyncGenerator[tuple[int, TaskEvent]]:
    """(number of the answer, event) of answers to several prompts, several to each.

    The answers of a group have one prompt: the first prefills it, the others begin after that and
    find it in the KV cache. An error of one answer ends them all.
    """
    sources: list[AsyncGenerator[TaskEvent]] = []
    for first, *others in groups:
        prefilled = asyncio.Event()
        sources.append(_first_of_group(first, prefilled))
        sources += [_after(prefilled, other) for other in others]
    if len(sources) == 1:
        async with aclosing(sources[0]) as events:
            async for event in events:
                yield 0, event
        return
    async with aclosing(merge_streams(sources)) as merged:
        async for item in merged:
            yield item


async def _first_of_group(
    answer: Callable[[], AsyncGenerator[TaskEvent]], prefilled: asyncio.Event
) -> AsyncGenerator[TaskEvent]:
    async with aclosing(answer()) as events:
        async for event in events:
            if isinstance(event, PromptRead | Finished):
                prefilled.set()
            yield event


async def _after(
    prefilled: asyncio.Event, answer: Callable[[], AsyncGenerator[TaskEvent]]
) -> AsyncGenerator[TaskEvent]:
    await prefilled.wait()
    async with aclosing(answer()) as events:
        async for event in events:
            yield event


async def merge_streams(
    sources: Sequence[AsyncIterator[TaskEvent]],
) -> AsyncGenerator[tuple[int, TaskEvent]]:
    """(number of the source, event) as they come; an error of one source ends them all."""
    async with aclosing(MergedStreams(sources)) as merged:
        while (item := await merged.next()) is not None:
            yield item
