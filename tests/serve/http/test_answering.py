"""Several answers at once, as one stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from neounify.serve.events import ServiceEvent, TextPiece
from neounify.serve.http.streaming import merge_streams

closed: list[str] = []


async def source(name: str, *items: float | Exception) -> AsyncGenerator[ServiceEvent]:
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            await asyncio.sleep(item)
            yield TextPiece(name)
    finally:
        closed.append(name)


@pytest.fixture(autouse=True)
def nothing_closed() -> None:
    closed.clear()


def test_events_come_as_they_are_ready() -> None:
    async def main() -> list[int]:
        sources = [source("a", 0.0, 0.2), source("b", 0.1)]
        return [number async for number, _ in merge_streams(sources)]

    assert asyncio.run(main()) == [0, 1, 0]
    assert sorted(closed) == ["a", "b"]


def test_an_error_closes_all() -> None:
    async def main() -> None:
        async for _ in merge_streams([source("a", 60.0), source("b", 0.0, ValueError("no"))]):
            pass

    with pytest.raises(ValueError, match="no"):
        asyncio.run(asyncio.wait_for(main(), 20))
    assert sorted(closed) == ["a", "b"]


def test_leaving_closes_all() -> None:
    async def main() -> None:
        async with aclosing(merge_streams([source("a", 60.0), source("b", 0.0, 60.0)])) as events:
            await anext(events)
        assert sorted(closed) == ["a", "b"]

    asyncio.run(asyncio.wait_for(main(), 20))
