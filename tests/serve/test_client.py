"""Client of an engine: late replies, deaths at any moment, starts that fail, timeouts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
import torch

from neounify.engine.messages import (
    Command,
    Exported,
    ImageReady,
    Prefix,
    Reply,
    StepPreview,
    new_number,
)
from neounify.engine.shared_memory import SharedTransport, folder
from neounify.errors import EngineDied, OutOfMemory
from neounify.serve import client as client_module
from neounify.serve.client import EngineClient, within
from neounify.serve.engines import Deliver, Died

PIXELS = torch.zeros(3, 8, 8)


class Scripted:
    """An engine whose starts do, in turn, what they are given; the last one from then on."""

    def __init__(self, *starts: Callable[[], None]) -> None:
        self.starts, self.started, self.stopped = list(starts), 0, False
        self.deliver: Deliver = lambda replies, report: None
        self.died: Died = lambda: None
        self.commands: list[Command] = []

    def start(self, deliver: Deliver, died: Died) -> None:
        self.started += 1
        act = self.starts.pop(0) if len(self.starts) > 1 else self.starts[0]
        self.deliver, self.died = deliver, died
        act()

    def send(self, command: Command) -> None:
        self.commands.append(command)

    def stop(self) -> None:
        self.stopped = True


def works() -> None:
    """The engine comes up."""


def fails() -> None:
    raise RuntimeError("the engine does not come up")


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 60)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture
def transport() -> SharedTransport:
    return SharedTransport()


def left(transport: SharedTransport) -> int:
    return len(list(folder().glob(f"{transport.prefix}[!.]*")))


def test_abandoned_results_are_freed(transport: SharedTransport) -> None:
    """Whether the reply comes after the call was closed, before it, or after the loop has ended."""
    engine = Scripted(works)
    client = EngineClient("generation", engine)

    def replies(call: int) -> list[Reply]:
        pixels, other, prefix = (transport.pack({"x": PIXELS}) for _ in range(3))
        return [
            Reply(call, StepPreview(0, 1, 2, pixels), False),
            Reply(call, ImageReady(0, other, 2.0), False),
            Reply(call, Exported((Prefix(prefix, 1),)), True),
        ]

    async def work() -> None:
        await client.start()
        late, early, ended = (
            client.open_call(new_number()),
            client.open_call(new_number()),
            client.open_call(new_number()),
        )
        client.close_call(late)
        for call in (late, early, ended):
            engine.deliver(replies(call.number), None)
        await early.next(5)
        assert left(transport) == 6  # all but those of the call that was closed before
        client.close_call(early)
        client.close_call(early)
        await client.stop()

    run(work)
    assert left(transport) == 1  # what was taken from the queue is its receiver's
    engine.deliver(replies(9), None)
    assert left(transport) == 1


def test_a_reply_is_not_lost_when_the_waiting_ends(transport: SharedTransport) -> None:
    engine = Scripted(works)
    client = EngineClient("generation", engine)

    async def work() -> None:
        await client.start()
        for turns in range(6):
            call = client.open_call(new_number())
            waiting = asyncio.ensure_future(call.next(5))
            await asyncio.sleep(0)
            engine.deliver(
                [Reply(call.number, ImageReady(0, transport.pack({"x": PIXELS}), 2.0), True)], None
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait((waiting,))
            if not waiting.cancelled():
                waiting.result().answer.pixels.free()  # type: ignore[union-attr]
            client.close_call(call)
        await client.stop()

    run(work)
    assert left(transport) == 0


def test_a_time_that_is_over_is_over_even_if_answers_are_there() -> None:
    async def work() -> None:
        engine = Scripted(works)
        client = EngineClient("generation", engine)
        await client.start()
        call = client.open_call(new_number())
        call.put(Reply(call.number, Exported(()), True))
        with pytest.raises(TimeoutError):
            await call.next(0)
        await client.stop()

    run(work)


def test_starts_that_fail_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "MAX_PAUSE", 0.01)
    engine = Scripted(works, *[fails] * 7, works)
    client = EngineClient("generation", engine)
    seen: set[str] = set()

    async def work() -> None:
        await client.start()
        call = client.open_call(new_number())
        engine.died()
        with pytest.raises(EngineDied):
            raise (await call.next(5)).answer.exception()  # type: ignore[union-attr]
        while not client.ready:
            seen.add(client.state)
            with pytest.raises(EngineDied, match=r"crashes in the last 60 s: [1-8]\)"):
                client.open_call(new_number())
            await asyncio.sleep(0.001)
        seen.add(client.state)
        await client.stop()
        seen.add(client.state)

    run(work)
    assert engine.started == 9
    assert client.restarts == 8
    assert seen == {"starting", "failing", "ready", "stopped"}
    assert "the generation engine crashed 6 times in 60 s" in caplog.text
    assert engine.stopped


def test_deaths_count_once_and_only_in_their_own_life() -> None:
    engine = Scripted(works)
    client = EngineClient("generation", engine)

    async def work() -> None:
        await client.start()
        died = engine.died
        for _ in range(3):
            died()
        await until(lambda: client.restarts == 1 and client.ready)
        died()
        await asyncio.sleep(0.05)
        assert client.ready
        await client.stop()

    run(work)
    assert engine.started == 2


def test_only_those_who_prepare_an_engine_may_call_it_before() -> None:
    engine = Scripted(works)
    client = EngineClient("generation", engine)

    async def prepare() -> None:
        with pytest.raises(EngineDied):
            client.open_call(new_number())
        client.close_call(client.open_call(new_number(), preparing=True))

    async def work() -> None:
        client.prepare = prepare
        await client.start()
        client.close_call(client.open_call(new_number()))
        engine.died()
        await until(lambda: client.restarts == 1 and client.ready)
        await client.stop()

    run(work)


@pytest.mark.parametrize(
    "error", [EngineDied("the other is down"), OutOfMemory("/dev/shm is full")]
)
def test_an_engine_waits_for_what_it_is_prepared_with(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other engine's death, or a full memory, is no reason to start this one again."""
    monkeypatch.setattr(client_module, "PREPARE_PAUSE", 0.01)
    engine = Scripted(works)
    client = EngineClient("generation", engine)
    asked = 0

    async def prepare() -> None:
        nonlocal asked
        asked += 1
        if 1 < asked < 5:
            raise error

    async def work() -> None:
        client.prepare = prepare
        await client.start()
        engine.died()
        await until(lambda: client.restarts == 1 and client.ready)
        await client.stop()

    run(work)
    assert asked == 5
    assert engine.started == 2


def test_a_death_while_it_is_prepared_starts_it_once_more() -> None:
    engine = Scripted(works)
    client = EngineClient("generation", engine)
    dies = [True]

    async def prepare() -> None:
        call = client.open_call(new_number(), preparing=True)
        if engine.started == 2 and dies.pop():
            engine.died()
            answer = (await call.next(5)).answer
            client.close_call(call)
            raise answer.exception()  # type: ignore[union-attr]
        client.close_call(call)

    async def work() -> None:
        client.prepare = prepare
        await client.start()
        engine.died()
        await until(lambda: client.restarts == 2 and client.ready)
        await client.stop()

    run(work)
    assert engine.started == 3


def test_what_keeps_an_engine_from_starting_at_all_is_raised() -> None:
    engine = Scripted(fails)
    client = EngineClient("generation", engine)

    async def work() -> None:
        with pytest.raises(RuntimeError, match="does not come up"):
            await client.start()
        await client.stop()

    run(work)
    assert engine.started == 1


def test_the_end_does_not_wait_for_a_start() -> None:
    ended = threading.Event()

    def waits() -> None:
        ended.wait(60)

    engine = Scripted(works, waits)
    client = EngineClient("generation", engine)
    stop = engine.stop

    def stops() -> None:
        ended.set()  # as killing the process does, whose start is waited for
        stop()

    async def work() -> None:
        await client.start()
        engine.died()
        await until(lambda: engine.started == 2)
        engine.stop = stops  # type: ignore[method-assign]
        await client.stop()

    run(work)
    assert engine.stopped


# --- timeouts ---


def test_a_result_in_time() -> None:
    assert asyncio.run(within(asyncio.sleep(0, "here"), 5)) == "here"
    assert asyncio.run(within(asyncio.sleep(0, "here"), None)) == "here"


def test_what_takes_too_long_is_cancelled() -> None:
    ended: list[bool] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        asyncio.run(within(slow(), 0.01))
    assert ended == [True]


def test_errors_come_through() -> None:
    async def broken() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(within(broken(), 5))


@pytest.mark.parametrize("turns", range(4))
def test_a_cancellation_beside_the_result_is_not_lost(turns: int) -> None:
    """Whatever the number of turns of the loop between the result and the cancellation."""

    async def race() -> bool:
        queue: asyncio.Queue[int] = asyncio.Queue()
        waiting = asyncio.ensure_future(within(queue.get(), 5))
        for _ in range(5):
            await asyncio.sleep(0)
        queue.put_nowait(1)
        for _ in range(turns):
            await asyncio.sleep(0)
        asked = waiting.cancel()
        await asyncio.wait((waiting,))
        return waiting.cancelled() == asked

    assert asyncio.run(race())
