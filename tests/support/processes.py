"""Processes that a test started: their children, and whether they run."""

from __future__ import annotations

import subprocess
from pathlib import Path


def runs(pid: int) -> bool:
    """Whether a process is running; a zombie, which awaits its parent, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """Processes that a process started."""
    done = subprocess.run(
        ["ps", "--no-headers", "-o", "pid", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(line) for line in done.stdout.split()]
