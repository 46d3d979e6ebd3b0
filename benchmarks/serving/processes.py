"""Processes and shared memory as Linux shows them in /proc and /dev/shm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

MB = 1e6
SAMPLE_SECONDS = 0.5
_PROC, _SHARED = Path("/proc"), Path("/dev/shm")
_GONE = (FileNotFoundError, ProcessLookupError)


def tree(root: int) -> list[int]:
    """A process and all that descend from it, the oldest first; none when it has ended."""
    processes = _running()
    if root not in processes:
        return []
    members = {root}
    for pid, (parent, _) in sorted(processes.items(), key=lambda item: item[1][1]):
        if parent in members:
            members.add(pid)
    return sorted(members, key=lambda pid: processes[pid][1])


def engines(root: int) -> list[int]:
    """The server's engines in separate processes, the oldest first."""
    return [pid for pid in tree(root) if b"spawn_main" in _command(pid)]


def alive(pid: int) -> bool:
    """Whether a process has not ended."""
    return pid in _running()


def resident_mb(root: int) -> float:
    """Resident memory of a process tree, MB (1e6 bytes).

    Pages that several of its processes share, like the code of libraries, count in each.
    """
    return sum(_resident(pid) for pid in tree(root)) / MB


def shared_memory() -> set[str]:
    """Names of the pieces of shared memory that Python processes of this machine hold.

    Without the locks by which servers say that they are alive.
    """
    return {entry.name for entry in _SHARED.glob("psm_*") if entry.suffix != ".lock"}


class MemoryWatch:
    """Samples a tree's resident memory from a thread while its block runs."""

    def __init__(
        self,
        root: int,
        seconds: float = SAMPLE_SECONDS,
        measure: Callable[[int], float] = resident_mb,
    ) -> None:
        self.samples: list[tuple[float, float]] = []
        """(time of `time.monotonic`, MB)."""
        self._root, self._seconds, self._measure = root, seconds, measure
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def peak(self) -> float:
        return max(mb for _, mb in self.samples)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.samples.append((time.monotonic(), self._measure(self._root)))
            if self._end.wait(self._seconds):
                return


def _running() -> dict[int, tuple[int, int]]:
    """pid → (parent, when it started), without those that have ended."""
    processes = {}
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(*_GONE):
                # The name in brackets may hold spaces and brackets itself.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    processes[int(folder.name)] = int(fields[1]), int(fields[19])
    return processes


def _command(pid: int) -> bytes:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes()
    except _GONE:
        return b""


def _resident(pid: int) -> int:
    """Bytes."""
    with suppress(*_GONE):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0
