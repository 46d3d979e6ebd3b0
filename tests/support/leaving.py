"""Callers who leave at a chosen moment, and what must be as before afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, Literal, TypeVar

import torch

import neounify
from neounify.engine.shared_memory import LOCK, folder
from neounify.serve.engines import EngineThread
from neounify.serve.service import EngineService

T = TypeVar("T")
When = Literal["early", "late"]


class LeaveAt(Generic[T]):
    """Awaits `work`, and cancels the task it runs in at the `number`-th time that it waits.

    "early" while the awaited result is still to come; "late" when it has come, but before the task
    runs again. `waits` counts on.
    """

    def __init__(self, work: Awaitable[T], number: int | None = None, when: When = "early") -> None:
        self._work, self._number, self._when = work, number, when
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._work.__await__()
        send: Callable[[], Any] = lambda: next(steps)  # noqa: E731
        while True:
            try:
                future = send()
            except StopIteration as end:
                value: T = end.value
                return value
            self.waits += 1
            if self.waits == self._number:
                self._leave(future)
            try:
                yield future
            except BaseException as error:
                send = _throwing(steps, error)
            else:
                send = lambda: next(steps)  # noqa: E731

    def _leave(self, future: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._when == "late" and isinstance(future, asyncio.Future):
            future.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


def _throwing(steps: Any, error: BaseException) -> Callable[[], Any]:
    return lambda: steps.throw(error)


async def waits_of(work: Awaitable[Any]) -> int:
    """How often it waits when no caller leaves."""
    counted = LeaveAt(work)

    async def run() -> None:
        await counted

    await asyncio.ensure_future(run())
    return counted.waits


async def leave(work: Awaitable[Any], number: int, when: When) -> bool:
    """Run it and leave; whether it was still under way then."""

    async def run() -> None:
        await LeaveAt(work, number, when)

    task = asyncio.ensure_future(run())
    await asyncio.wait((task,))
    if not task.cancelled():
        task.result()  # it had ended before
    return task.cancelled()


def pieces_of(service: EngineService) -> set[str]:
    """Its pieces of shared memory, without the lock that it holds while it runs."""
    space = service.clients.space
    if space is None:
        return set()
    return {path.name for path in folder().glob(f"{space.prefix}*") if path.suffix != LOCK}


async def at_rest(service: EngineService, like: dict[str, float] | None = None) -> dict[str, float]:
    """The gauges when nothing is under way and they are as in `like`; fails if they never are."""
    gauges: dict[str, float] = {}
    for _ in range(1500):
        await asyncio.sleep(0.02)
        gauges = {name: n for name, n in service.gauges().items() if name != "gen_batch"}
        busy = ("requests", "image_tokens", "und_waiting", "und_reading", "und_writing")
        if any(gauges.get(name, 1) for name in (*busy, "gen_images")):
            continue
        if like is None or gauges == like:
            return gauges
    raise AssertionError(f"the gauges are {gauges} and not those of a server at rest, {like}")


def check_books(service: EngineService) -> None:
    """Whether the cache's books are right, where they are in this process."""
    engine = service.clients.understanding.engine
    if isinstance(engine, EngineThread):
        assert engine.understanding is not None
        engine.understanding.check()


def calls_open(service: EngineService) -> int:
    return sum(len(client._calls) for client in service.clients.all)


def let_it_paint(pipe: neounify.Pipeline) -> neounify.Pipeline:
    """Make an untrained model open an image about every other time that it is asked to write.

    Its scores are then those of one number of its state for `<img>`, and the opposite for "x".
    """
    head = pipe.model.lm_head.weight
    with torch.no_grad():
        head.zero_()
        head[pipe.processor.token("<img>"), 0] = 1.0
        head[ord("x"), 0] = -1.0
    return pipe
