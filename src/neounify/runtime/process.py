"""Process-wide settings of commands, servers and benchmarks: memory, threads, collection."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import re
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
"""Parameters of mallopt(3)."""
LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""glibc ignores a larger one."""

MEMORY_INFO, CONTROL_GROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
"""Files of the system about memory: of the machine, and of control groups and who is in them."""
VM_STAT = Path("/usr/bin/vm_stat")
"""The command of macOS that lists pages of memory by what they are used for."""
AVAILABLE_PAGES = ("free", "speculative", "inactive")
"""Those that can be taken without swapping, as psutil counts them."""

SWITCH_SECONDS = 0.0005
"""Threads of one process take turns this often, instead of every 5 ms; see docs/log.md."""


def switch_threads_often() -> None:
    """Shorten the thread switch interval, so that the engines' thread does not delay HTTP."""
    sys.setswitchinterval(SWITCH_SECONDS)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch, so that sums have one order and times one core whatever the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> bool:
    """Keep freed memory in glibc for the next tensor instead of returning it to the system.

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


def share_one_arena() -> bool:
    """Allocate from one malloc arena in all threads started from now on.

    glibc gives each thread a separate arena of up to 64 MiB that is never given back. Returns
    whether it was possible.
    """
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1) == 1)
    except (OSError, AttributeError):
        return False


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Import large libraries without garbage collection, and exempt their objects from it.

    Importing torch makes hundreds of thousands of objects that all stay: collections that look for
    garbage among them take a quarter of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def freeze_objects() -> None:
    """Exempt all objects of now from garbage collection, at the end of a server's start.

    A collection visits every object of torch and of the application: 0.2 s on one core, with all
    requests waiting. Called once what is loaded stays for the life of the process.
    """
    gc.collect()
    gc.freeze()


class MemoryReturner:
    """Returns freed memory to the system after work that left the process far larger.

    Only when at least GROWTH bytes were added since the last time, and then every INTERVAL seconds
    unless it is URGENT bytes: what the engines use again and again is better kept.
    """

    GROWTH, URGENT = 32 * 2**20, 96 * 2**20
    INTERVAL = 1.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next, self._resident = clock(), resident_bytes()

    @property
    def is_due(self) -> bool:
        """Whether `run` would do anything."""
        growth = resident_bytes() - self._resident
        return growth > self.URGENT or (growth > self.GROWTH and self._clock() >= self._next)

    def run(self) -> None:
        """Give memory back; takes some hundredths of a second."""
        self._next = self._clock() + self.INTERVAL
        gc.collect()  # a refused request is in a cycle with its error
        return_freed_memory()
        self._resident = resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


class OwnMemory(NamedTuple):
    """Resident bytes of a process, and those of them that are pages of no file."""

    resident: int
    private: int


@functools.cache
def own_memory() -> OwnMemory:
    """The memory of this process as it was when first asked; zeros where it is not reported.

    `load` asks before it reads weights, so that those of a first model do not count for a second.
    """
    resident = resident_bytes()
    if not resident:
        return OwnMemory(0, 0)
    of_files = int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()
    return OwnMemory(resident, resident - of_files)


def available_bytes() -> int | None:
    """Memory this process can still take without swapping, in bytes; None where unknown.

    On Linux the smallest of what the system and its control groups have left, on macOS by
    `vm_stat`. Pages of mapped files count as available.
    """
    try:
        line = next(x for x in MEMORY_INFO.read_text().splitlines() if x.startswith("MemAvailable"))
        available = int(line.split()[1]) * 1024
    except (OSError, ValueError, StopIteration):
        return _vm_stat_bytes()
    return max(0, min([available, *(group.left for group in control_groups())]))


def _vm_stat_bytes() -> int | None:
    """`available_bytes` of macOS; None where its command is not there or says something else."""
    try:
        done = subprocess.run([VM_STAT], check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    size = re.search(r"page size of (\d+) bytes", done.stdout)
    pages = dict(re.findall(r"^Pages (\w+): +(\d+)\.$", done.stdout, re.M))
    if size is None or not pages.keys() >= set(AVAILABLE_PAGES):
        return None
    return int(size[1]) * sum(int(pages[kind]) for kind in AVAILABLE_PAGES)


def memory_bytes() -> int:
    """Memory this process may use at most, in bytes: the machine's, or its control groups'."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(group.limit for group in control_groups())])


class ControlGroup(NamedTuple):
    """Bytes that a control group may take, and that it has left."""

    limit: int
    left: int


def control_groups() -> list[ControlGroup]:
    """The control groups with a limit of memory that this process is in, of version 1 or 2.

    A group is bound by those above it too. Those outside a container cannot be seen in it.
    """
    try:
        memberships = [line.split(":", 2) for line in MEMBERSHIP.read_text().splitlines()]
    except OSError:
        return []
    groups = []
    for _, controllers, path in memberships:
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        mount = CONTROL_GROUPS / "memory" if version == 1 else CONTROL_GROUPS
        inner = mount / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(mount) and (group := _control_group(folder, version)):
                groups.append(group)
    return groups


def _control_group(folder: Path, version: int) -> ControlGroup | None:
    """The group of a folder; None without files or a limit, which reads as "max" in version 2."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    if version == 2:
        names = ("memory.max", "memory.current", "")
    try:
        limit, used = (int((folder / name).read_text()) for name in names[:2])
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        pages = sum(int(stat[f"{names[2]}{kind}_file"]) for kind in ("active", "inactive"))
    except (OSError, ValueError, KeyError):
        return None
    return ControlGroup(limit, limit - used + pages)


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


_CPU_INFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """Name of the processor as the system reports it."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def processor_vendor() -> str:
    """Vendor of an x86 processor, such as "AuthenticAMD"; empty where the system does not say."""
    return _cpu_info("vendor_id")


def _cpu_info(field: str) -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""


def private_ray() -> dict[str, str]:
    """Environment variables of a Ray on loopback without usage reports, which it reads on import.

    One port of each worker listens on all interfaces nevertheless. It requires the token, which is
    random each time and written to no file.
    """
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's name for the option that it stays on loopback, on Linux too.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
