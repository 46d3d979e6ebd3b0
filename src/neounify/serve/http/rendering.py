"""Bodies of answers, made on the event loop where they are small and in a thread where not.

Base64, JSON and lists of log-probabilities take about 10 ms of a processor per MB, during which an
event loop answers nothing else; a change of threads takes about 0.1 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from starlette.responses import JSONResponse

from neounify.serve.http.sse import sse

Result = TypeVar("Result")

INLINE_BYTES = 64 * 1024
"""Bodies up to this are made on the event loop."""


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
