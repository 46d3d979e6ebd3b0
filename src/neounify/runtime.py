"""Settings of the whole process, chosen by its programs (commands, servers, benchmarks)."""

from __future__ import annotations

import ctypes
import sys

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
