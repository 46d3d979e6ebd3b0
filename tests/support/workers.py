"""Number of workers that `pytest -n auto` starts."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

BYTES_PER_WORKER = 3 * 2**30
"""A worker grows to 2 GB in the whole run, and the servers that it starts come on top."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One for each core that this process may use, as far as the memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores or 1, _quota(), memory // BYTES_PER_WORKER))


def _quota() -> int:
    """The cores that a container may use, rounded up; many where nothing is said."""
    try:
        quota, period = QUOTA.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return 10**6
