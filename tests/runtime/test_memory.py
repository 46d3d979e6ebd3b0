"""Freed memory that goes back to the system."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from neounify.runtime import process as runtime
from neounify.runtime.process import MemoryReturner


def test_memory_goes_back_only_after_growth_and_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now, resident, returned = [0.0], [10**9], []
    monkeypatch.setattr(runtime, "resident_bytes", lambda: resident[0])
    monkeypatch.setattr(runtime, "return_freed_memory", lambda: returned.append(now[0]))
    memory = MemoryReturner(lambda: now[0])
    due = []

    def grow(size: int) -> None:
        resident[0] += size
        due.append(memory.is_due)

    grow(0)
    grow(MemoryReturner.GROWTH + 1)
    memory.run()
    grow(0)
    grow(MemoryReturner.GROWTH + 1)
    now[0] += MemoryReturner.INTERVAL
    grow(0)
    memory.run()
    grow(MemoryReturner.URGENT + 1)
    assert due == [False, True, False, False, True, True]
    assert len(returned) == 2


def test_the_system_says_how_large_the_process_is() -> None:
    before = runtime.resident_bytes()
    if before == 0:
        pytest.skip("no /proc/self/statm")
    # Mapped, as an allocator might take it from what was freed before.
    with mmap.mmap(-1, 64 * 2**20) as memory:
        memory.write(bytes(len(memory)))
        assert runtime.resident_bytes() > before + len(memory) // 2


def test_memory_that_can_still_be_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's, or what a control group has left; pages of files can be had again."""
    monkeypatch.setattr(runtime, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(runtime, "MEMORY_INFO", tmp_path / "meminfo")
    assert runtime.available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert runtime.available_bytes() == 4000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000\nfile 1000000\n")
    assert runtime.available_bytes() == 4000 * 1024
    (tmp_path / "memory.max").write_text("5000000\n")
    assert runtime.available_bytes() == 3_000_000
    (tmp_path / "memory.max").write_text("1000000\n")
    assert runtime.available_bytes() == 0
