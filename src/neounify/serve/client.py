"""Client of an engine: calls, replies, restart after a crash."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from neounify.engine.messages import (
    Command,
    EngineReport,
    Failed,
    Reply,
    Transport,
    discard,
    is_for_generation,
)
from neounify.engine.shared_memory import SharedSpace
from neounify.errors import EngineDied, ServiceError
from neounify.serve.engines import EngineHandle

R = TypeVar("R")

log = logging.getLogger("neounify.serve")

EngineState = Literal["ready", "starting", "failing", "stopped"]

MAX_DEATHS, DEATH_SECONDS = 5, 60.0
"""An engine that crashes more often in so many seconds is "failing"; it is still restarted."""
FREE_DEATHS, MAX_PAUSE = 3, 10.0
"""After that many deaths each new start waits a second longer, up to so many seconds."""
PREPARE_PAUSE = 0.5
"""Seconds between two tries to prepare an engine that waits for the other one."""


# --- calls ---


async def within(work: Awaitable[R], seconds: float | None) -> R:
    """The result of `work`; cancels it and raises TimeoutError when it takes longer.

    Unlike `asyncio.wait_for` before Python 3.12, which drops a cancellation that arrives together
    with the result: with many quick answers that happens, and the cancelled task runs on.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
        if task.cancelled():
            raise TimeoutError
    return task.result()


class Call:
    """One call to an engine: its number, and the replies as they come."""

    def __init__(self, number: int, client: EngineClient) -> None:
        self.number, self.client = number, client
        self.answered = False
        """Whether the last reply was taken."""
        self._replies: deque[Reply] = deque()
        self._arrived = asyncio.Event()

    def put(self, reply: Reply) -> None:
        self._replies.append(reply)
        self._arrived.set()

    async def next(self, seconds: float | None) -> Reply:
        """The next reply; TimeoutError when none comes in time, or the time is over.

        A reply is not taken before this returns it, so that none is lost when the waiting ends.
        """
        if seconds is not None and seconds <= 0:
            raise TimeoutError
        while not self._replies:
            self._arrived.clear()
            await within(self._arrived.wait(), seconds)
        reply = self._replies.popleft()
        self.answered = reply.final
        return reply

    def discard(self) -> None:
        """Free the tensors of replies that were not taken."""
        while self._replies:
            discard(self._replies.popleft())


# --- the engine ---


class EngineClient:
    """Calls one engine and starts it again when it dies.

    `prepare` is awaited after every start, before the client is `ready`. An engine that cannot be
    started again is tried without end, with pauses; meanwhile calls are refused.
    """

    def __init__(self, name: str, engine: EngineHandle) -> None:
        self.name, self.engine = name, engine
        self.ready = False
        self.restarts = 0
        self.prepare: Callable[[], Awaitable[None]] | None = None
        self._calls: dict[int, Call] = {}
        self._deaths: deque[float] = deque()
        self.report = EngineReport({}, {})
        """The newest one; empty while the engine is being started again."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._dead = asyncio.Event()
        self._alive = self._preparing = self._stopped = False
        self._starts = 0

    @property
    def state(self) -> EngineState:
        """Readiness of the engine, as reported to users."""
        if self._stopped:
            return "stopped"
        if self.ready:
            return "ready"
        return "failing" if self._recent_deaths() > MAX_DEATHS else "starting"

    async def start(self) -> None:
        """Start the engine and wait until it is ready; raises what keeps it from starting.

        From then on it is restarted whenever it dies.
        """
        self._loop = asyncio.get_running_loop()
        await self._bring_up()
        self._keeper = asyncio.ensure_future(self._keep_up())

    async def stop(self) -> None:
        self.ready = self._alive = False
        self._stopped = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.to_thread(self.engine.stop)
        await asyncio.sleep(0)  # the last replies delivered are handled now, and freed
        for call in list(self._calls.values()):
            self.close_call(call)

    def down(self) -> EngineDied:
        """The error for calls to an engine that is not up."""
        return EngineDied(
            f"the {self.name} engine is being started (crashes in the last {DEATH_SECONDS:g} s: "
            f"{self._recent_deaths()}); try again in a few seconds"
        )

    def open_call(self, number: int, *, preparing: bool = False) -> Call:
        """A call of this number, which its commands carry.

        Raises EngineDied while the engine is down, and before it is prepared unless the call is
        part of preparing it.
        """
        if not self._alive or (self._preparing and not preparing):
            raise self.down()
        call = Call(number, self)
        self._calls[call.number] = call
        return call

    def close_call(self, call: Call) -> None:
        """Free the replies to a call, present and future. Closing it twice is fine."""
        self._calls.pop(call.number, None)
        call.discard()

    def send(self, command: Command) -> None:
        """Send a command; it is lost while the engine is down."""
        if self._alive:
            self.engine.send(command)

    # --- start and restart ---

    async def _bring_up(self) -> None:
        self._dead.clear()
        self._starts += 1
        died = partial(self._soon, self._died, self._starts)
        await asyncio.to_thread(self.engine.start, self._deliver_soon, died)
        self._preparing, self._alive = True, not self._dead.is_set()
        await self._prepare()
        if self._dead.is_set():
            raise EngineDied(f"the {self.name} engine ended while it was being started")
        self._preparing, self.ready = False, True

    async def _prepare(self) -> None:
        """Prepare the engine, again if it was another engine whose death kept it from that."""
        while self.prepare is not None:
            try:
                await self.prepare()
                return
            except EngineDied:
                if self._dead.is_set():
                    raise
            except ServiceError:
                if not self.restarts:
                    raise
                log.warning("the %s engine cannot be prepared yet", self.name, exc_info=True)
            await asyncio.sleep(PREPARE_PAUSE)

    async def _keep_up(self) -> None:
        while True:
            await self._dead.wait()
            await asyncio.sleep(self._pause())
            self.restarts += 1
            log.warning("starting the %s engine again (restart %d)", self.name, self.restarts)
            try:
                await self._bring_up()
            except Exception:
                log.exception("the %s engine could not be started again", self.name)
                self._died(self._starts)

    def _died(self, start: int) -> None:
        """Handle the end of the engine of that start; may be called twice, or late."""
        if self._stopped or start != self._starts or self._dead.is_set():
            return
        self.ready = self._alive = False
        self.report = EngineReport({}, {})
        died = Failed("EngineDied", f"the {self.name} engine ended while it worked on the request")
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.put(Reply(call.number, died, True))
        self._deaths.append(time.monotonic())
        if self._recent_deaths() > MAX_DEATHS:
            log.critical(
                "the %s engine crashed %d times in %g s; restarts continue, up to %g s apart",
                self.name,
                self._recent_deaths(),
                DEATH_SECONDS,
                MAX_PAUSE,
            )
        self._dead.set()

    def _recent_deaths(self) -> int:
        now = time.monotonic()
        while self._deaths and now - self._deaths[0] > DEATH_SECONDS:
            self._deaths.popleft()
        return len(self._deaths)

    def _pause(self) -> float:
        """Seconds to wait before a new start."""
        return min(MAX_PAUSE, float(max(0, self._recent_deaths() - FREE_DEATHS)))

    # --- callbacks from the engine's threads ---

    def _deliver_soon(self, replies: Sequence[Reply], report: EngineReport | None) -> None:
        if not self._soon(self._deliver, replies, report):
            for reply in replies:
                discard(reply)

    def _soon(self, act: Callable[..., None], *arguments: object) -> bool:
        """Schedule a function on the event loop; False when the loop has ended."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(act, *arguments)
        except RuntimeError:
            return False
        return True

    def _deliver(self, replies: Sequence[Reply], report: EngineReport | None) -> None:
        if report is not None:
            self.report = report
        for reply in replies:
            call = self._calls.get(reply.call)
            if call is None:
                discard(reply)
            else:
                call.put(reply)


@dataclass(frozen=True)
class EngineClients:
    """Clients of the two engines; in one process both are the same.

    `space` reserves the names of shared memory, None where none is used.
    """

    understanding: EngineClient
    generation: EngineClient
    transport: Transport
    space: SharedSpace | None = None

    @property
    def all(self) -> list[EngineClient]:
        same = self.understanding is self.generation
        return [self.understanding] if same else [self.understanding, self.generation]

    def of(self, command: Command) -> EngineClient:
        """Client of the engine that runs a command."""
        return self.generation if is_for_generation(command) else self.understanding
