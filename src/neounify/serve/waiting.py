"""Timeouts that never lose a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def within(work: Awaitable[Result], seconds: float | None) -> Result:
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
