"""Decoders of input images and clips: one thread each, with what bounds the work of clips."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from neounify.serve.http.errors import ApiError
from neounify.video.read import PROCESS_STARTED

Result = TypeVar("Result")


class MediaDecoder:
    """A thread that decodes all images of a server, or all clips, one after the other.

    So the memory of decoding is that of one of them, whatever the number of requests.
    """

    def __init__(self) -> None:
        self._executor = self._start()

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which is not begun after the caller was cancelled."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """End the thread; what waits for it is not decoded. `run` starts another one."""
        executor, self._executor = self._executor, self._start()
        executor.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _start() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="decode")


class ClipDecoder(MediaDecoder):
    """Decoder of clips for at most `max_requests` at a time; its processes end with their caller.

    Decoding a clip may take half a minute, which a caller who is gone must not cost the others.
    """

    def __init__(self, max_requests: int) -> None:
        super().__init__()
        self._max_requests = max_requests
        self.requests = 0
        """Whose clips are read now."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context of one request whose clips are read. Raises ApiError 429 for one too many."""
        if self.requests >= self._max_requests:
            raise ApiError(
                429,
                f"The server reads the clips of {self.requests} requests, its limit; try again "
                "soon.",
                kind="rate_limit_error",
                code="overloaded",
                retry_after=2.0,
            )
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

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
