"""Decoders of input images and clips: one thread each, with what bounds the work of clips."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from neounify.serve.http.errors import overloaded
from neounify.video.read import PROCESS_STARTED

Result = TypeVar("Result")
_RETRY_SECONDS = 2.0


class MediaThread:
    """A thread for one kind of work of all requests, one piece after the other.

    So the memory of the work is that of one piece, whatever the number of requests.
    """

    name = "media"

    def __init__(self) -> None:
        self._executor = self._start()

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which is neither begun nor kept after the caller was cancelled."""
        # The executor keeps cancelled items until their turn, and `work` may hold a file.
        waiting = [work]

        def begin() -> Result:
            try:
                begun = waiting.pop()
            except IndexError:  # cancelled just before its turn
                raise CancelledError from None
            return begun()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, begin)
        finally:
            waiting.clear()

    def close(self) -> None:
        """End the thread; what waits for it is not begun. `run` starts another one."""
        executor, self._executor = self._executor, self._start()
        executor.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix=self.name)


class MediaDecoder(MediaThread):
    """The thread that decodes all images of a server, or all clips."""

    name = "decode"


class ClipDecoder(MediaDecoder):
    """Decoder of clips for at most `max_requests` at a time; its processes end with their caller.

    Decoding a clip may take half a minute, which a caller who is gone must not cost the others. Of
    several `callers` each can read as many clips as are left free, so one alone has half of the
    places, and one that has none gets a place while any is free.
    """

    def __init__(self, max_requests: int, callers: int) -> None:
        super().__init__()
        self._max_requests, self._callers = max_requests, callers
        self._reading = Counter[str]()
        """Requests whose clips are read now, by their caller."""
        self.fetching = asyncio.Lock()
        """Held while a clip is fetched and decoded, so that clips that wait hold no memory."""

    @property
    def requests(self) -> int:
        """The number of requests whose clips are read now."""
        return self._reading.total()

    @contextmanager
    def reading(self, caller: str) -> Iterator[None]:
        """Context of one request whose clips are read. Raises ApiError 429 for one too many."""
        total, mine = self.requests, self._reading[caller]
        if total >= self._max_requests:
            raise overloaded(
                f"The server reads the clips of {total} requests, its limit; try again soon.",
                _RETRY_SECONDS,
            )
        if self._callers > 1 and mine >= self._max_requests - total:
            raise overloaded(
                f"The server reads the clips of {mine} of your requests, as many as it reads now "
                "for one API key; try again soon.",
                _RETRY_SECONDS,
            )
        self._reading[caller] += 1
        try:
            yield
        finally:
            self._reading[caller] -= 1
            self._reading += Counter()  # drops counts of zero

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, whose process is killed when the caller is cancelled."""
        processes = _Processes()

        def watched() -> Result:
            token = PROCESS_STARTED.set(processes.add)
            try:
                return work()
            finally:
                PROCESS_STARTED.reset(token)

        try:
            return await super().run(watched)
        finally:
            processes.kill()


class _Processes:
    """The processes of one piece of work, killed from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_killed = False

    def add(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._processes.append(process)
            if self._is_killed:
                process.kill()

    def kill(self) -> None:
        """Kill them, and those that are added later; without effect on processes that ended."""
        with self._lock:
            self._is_killed = True
            for process in self._processes:
                process.kill()
