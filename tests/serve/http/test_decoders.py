"""Decoders: what waits for its turn, and how the places to read clips are shared."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from contextlib import ExitStack
from functools import partial

import pytest

from neounify.serve.http.decoders import ClipDecoder, MediaDecoder
from neounify.serve.http.errors import ApiError


class _File:
    """A file that work refers to."""


@pytest.mark.parametrize("decoder", [MediaDecoder(), ClipDecoder(1, 1)], ids=["images", "clips"])
def test_work_that_is_cancelled_keeps_no_file(decoder: MediaDecoder) -> None:
    async def work() -> None:
        may_end = threading.Event()
        first = asyncio.ensure_future(decoder.run(lambda: may_end.wait(20)))
        file = _File()
        alive = weakref.ref(file)
        second = asyncio.ensure_future(decoder.run(partial(id, file)))
        del file
        await asyncio.sleep(0.05)
        assert alive() is not None
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        del second
        await asyncio.sleep(0.05)  # the loop drops the result of gather
        gc.collect()
        try:
            assert alive() is None
        finally:
            may_end.set()
        assert await first
        assert await decoder.run(lambda: 5) == 5

    asyncio.run(work())
    decoder.close()


def test_errors_of_work_are_raised() -> None:
    def fail() -> None:
        raise IndexError("of the work")

    decoder = MediaDecoder()
    with pytest.raises(IndexError, match="of the work"):
        asyncio.run(decoder.run(fail))
    decoder.close()


def test_a_caller_leaves_places_to_others() -> None:
    decoder = ClipDecoder(8, callers=3)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(decoder.reading("ann"))
        with pytest.raises(ApiError, match="clips of 4 of your requests") as error:
            stack.enter_context(decoder.reading("ann"))
        assert (error.value.status_code, error.value.code) == (429, "overloaded")
        for caller in ("bob", "bob", "cleo"):
            stack.enter_context(decoder.reading(caller))
        with pytest.raises(ApiError, match="of your requests"):
            stack.enter_context(decoder.reading("bob"))
        stack.enter_context(decoder.reading("dan"))
        with pytest.raises(ApiError, match="clips of 8 requests, its limit"):
            stack.enter_context(decoder.reading("eve"))
        assert decoder.requests == 8
    assert decoder.requests == 0
    assert not decoder._reading
    decoder.close()


def test_the_only_caller_has_all_places() -> None:
    decoder = ClipDecoder(2, callers=0)
    with decoder.reading("everybody"), decoder.reading("everybody"):
        assert decoder.requests == 2
        with pytest.raises(ApiError, match="its limit"), decoder.reading("everybody"):
            pass
    decoder.close()
