"""Waiting within a time limit: results, lateness, and a cancellation at the worst moment."""

from __future__ import annotations

import asyncio

import pytest

from neounify.serve.client import within


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
