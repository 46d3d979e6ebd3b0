"""Generators that run in tasks of their own, and what they yield in the order in which it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Pump(Generic[Item]):
    """Runs sources, each at most two items ahead; whoever makes one closes it."""

    def __init__(self, sources: Sequence[AsyncIterator[Item]]) -> None:
        self._queue: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue(1)
        self._tasks = [asyncio.ensure_future(self._run(n, s)) for n, s in enumerate(sources)]
        self._open = len(self._tasks)

    async def next(self) -> tuple[int, Item] | None:
        """(number of the source, item); None once all have ended.

        Raises what a source raised; that ends them all.
        """
        while self._open:
            found = await self._queue.get()
            if isinstance(found, Exception):
                self._open = 0
                raise found
            if found is not None:
                return found
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
        except Exception as error:  # handed over to whoever reads the queue
            await self._queue.put(error)
        else:
            await self._queue.put(None)
