"""Settings of the whole process, chosen by its programs (commands, servers, benchmarks)."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""glibc ignores a larger one."""

SWITCH_SECONDS = 0.0005
"""Threads of one process take turns this often, instead of every 5 ms; see docs/log.md."""


def switch_threads_often() -> None:
    """Let the thread that answers clients take its turn soon beside the one that runs engines."""
    sys.setswitchinterval(SWITCH_SECONDS)


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensor instead of returning it to the system.

    Tensors of some megabytes come and go with every operation; getting their pages anew
    each time cost up to an eighth of a denoising step (docs/log.md). The process then keeps
    its peak of working memory until it ends. Returns whether it was possible: it is not
    where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD),
        (M_TRIM_THRESHOLD, 2**31 - 1),
        (M_TOP_PAD, 64 * 2**20),
    )
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


class MemoryReturner:
    """Gives freed memory back after work that left the process far larger than it was.

    At most every INTERVAL seconds, and only when at least GROWTH bytes were added since the last
    time: what the engines use again and again is better kept.
    """

    GROWTH = 64 * 2**20
    INTERVAL = 2.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next, self._resident = clock(), resident_bytes()

    @property
    def is_due(self) -> bool:
        """Whether `run` would do anything."""
        return self._clock() >= self._next and resident_bytes() > self._resident + self.GROWTH

    def run(self) -> None:
        """Give memory back; takes some milliseconds."""
        self._next = self._clock() + self.INTERVAL
        return_freed_memory()
        self._resident = resident_bytes()


def resident_bytes() -> int:
    """Memory of this process in the machine, in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def return_freed_memory() -> bool:
    """Give what was freed back to the system, after work that took far more than is usual.

    Undoes `keep_freed_memory` once: the next tensors get their pages anew. Returns whether it was
    possible.
    """
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return False
    return bool(trim(0))
