"""The front's end of the line to an engine: calls, answers, a new start after a death."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from neounify.serve.events import EngineDied
from neounify.serve.hosts import Host
from neounify.serve.messages import Answer, Failed, Order, Reply, Report
from neounify.serve.waiting import within

log = logging.getLogger("neounify.serve")

MOST_DEATHS, WITHIN_SECONDS = 5, 60.0
"""An engine that dies more often than that is given up: something is wrong with it for good."""


class Call:
    """One call to an engine: its number, and the answers as they come."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._answers: asyncio.Queue[Reply] = asyncio.Queue()

    def put(self, reply: Reply) -> None:
        self._answers.put_nowait(reply)

    async def next(self, seconds: float | None) -> Reply:
        """The next reply; TimeoutError when none comes in time."""
        return await within(self._answers.get(), seconds)


class EngineLink:
    """Calls one worker and starts it again when it dies.

    `prepare` is awaited after every start, before the link is `ready`.
    """

    _numbers = itertools.count(1)

    def __init__(self, name: str, host: Host) -> None:
        self.name, self.host = name, host
        self.ready = False
        self.restarts = 0
        self.prepare: Callable[[], Awaitable[None]] | None = None
        self._calls: dict[int, Call] = {}
        self._deaths: list[float] = []
        self._report = Report({}, {})
        self._loop: asyncio.AbstractEventLoop | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._alive = False

    @property
    def report(self) -> Report:
        """The newest one."""
        return self._report

    async def start(self) -> None:
        """Start the worker and wait until it can be used."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self.host.start, self._deliver_soon, self._died_soon)
        self._alive = True
        if self.prepare is not None:
            await self.prepare()
        self.ready = True

    async def stop(self) -> None:
        self.ready = self._alive = False
        if self._restarting is not None:
            self._restarting.cancel()
        await asyncio.to_thread(self.host.stop)

    def open_call(self) -> Call:
        """A call for orders to carry the number of. Raises EngineDied while the engine is down."""
        if not self._alive:
            raise EngineDied(f"the {self.name} engine is being started again; try again soon")
        call = Call(next(self._numbers))
        self._calls[call.number] = call
        return call

    def close_call(self, call: Call) -> None:
        self._calls.pop(call.number, None)

    def send(self, order: Order) -> None:
        """Give an order; it is lost while the engine is down."""
        if self._alive:
            self.host.send(order)

    def _deliver_soon(self, replies: Sequence[Reply], report: Report | None) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, replies, report)

    def _died_soon(self) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._died)

    def _deliver(self, replies: Sequence[Reply], report: Report | None) -> None:
        if report is not None:
            self._report = report
        for reply in replies:
            call = self._calls.get(reply.call)
            if call is not None:
                call.put(reply)

    def _died(self) -> None:
        self.ready = self._alive = False
        died = Failed("EngineDied", f"the {self.name} engine ended while it worked on the request")
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.put(Reply(call.number, died, True))
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < WITHIN_SECONDS] + [now]
        if len(self._deaths) > MOST_DEATHS:
            log.critical("the %s engine dies again and again and is given up", self.name)
            return
        self._restarting = asyncio.ensure_future(self._restart())

    async def _restart(self) -> None:
        self.restarts += 1
        log.warning("starting the %s engine again", self.name)
        try:
            await self.start()
        except Exception:
            log.exception("the %s engine could not be started again", self.name)
            self._died()


def answer_or_raise(answer: Answer, errors: Mapping[str, type[Exception]]) -> Answer:
    """The answer, unless it is a failure: then the error of that name."""
    if isinstance(answer, Failed):
        raise errors.get(answer.kind, RuntimeError)(answer.message)
    return answer
