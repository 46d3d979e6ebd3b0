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


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Files of a system with 4,000 kB available, without control groups yet."""
    monkeypatch.setattr(runtime, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(runtime, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(runtime, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(runtime, "VM_STAT", tmp_path / "vm_stat")
    (tmp_path / "groups").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    return tmp_path


def control_group(folder: Path, version: int, limit: object, used: int) -> None:
    """A group that uses `used` bytes, of which 1,000,000 are pages of files."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }
    limit_name, used_name, total = names[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"{total}shmem 7\n{total}active_file 400000\n{total}inactive_file 600000\n"
    )


def test_memory_that_can_still_be_taken(system: Path) -> None:
    """The machine's, or what a control group has left; pages of files can be had again."""
    assert runtime.available_bytes() == 4000 * 1024
    (system / "membership").write_text("0::/\n")
    assert runtime.available_bytes() == 4000 * 1024
    for limit, left in (("max", 4000 * 1024), (5_000_000, 3_000_000), (1_000_000, 0)):
        control_group(system / "groups", 2, limit, 3_000_000)
        assert runtime.available_bytes() == left
    (system / "meminfo").unlink()
    assert runtime.available_bytes() is None


def test_a_group_is_bound_by_those_above_it(system: Path) -> None:
    (system / "membership").write_text("0::/user.slice/run-7.scope\n")
    inner = system / "groups" / "user.slice" / "run-7.scope"
    control_group(inner, 2, 2_000_000, 1_500_000)
    assert runtime.available_bytes() == 1_500_000
    control_group(inner.parent, 2, 2_000_000, 2_400_000)
    assert runtime.available_bytes() == 600_000
    assert [group.limit for group in runtime.control_groups()] == [2_000_000, 2_000_000]


def test_groups_of_version_1_count_too(system: Path) -> None:
    (system / "membership").write_text("9:name=systemd:/\n4:cpu,memory:/job\n1:cpu:/\n0::/\n")
    control_group(system / "groups" / "memory", 1, 2**63 - 4096, 3_000_000)
    assert runtime.available_bytes() == 4000 * 1024
    control_group(system / "groups" / "memory" / "job", 1, 3_500_000, 3_000_000)
    assert runtime.available_bytes() == 1_500_000
    # A container shows its group as the root of the mount, under a name of the host.
    (system / "membership").write_text("4:memory:/docker/1f\n")
    control_group(system / "groups" / "memory", 1, 2_500_000, 3_000_000)
    assert runtime.available_bytes() == 500_000


VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               12345.
Pages active:                            300000.
Pages inactive:                          290000.
Pages speculative:                         5000.
Pages throttled:                              0.
Pages wired down:                        150000.
"Translation faults":                 123456789.
Pages stored in compressor:              400000.
"""


def test_macos_lists_its_pages(system: Path) -> None:
    (system / "meminfo").unlink()
    command = system / "vm_stat"
    for text, expected in (
        (VM_STAT, 16384 * (12345 + 290_000 + 5000)),
        (VM_STAT.replace("Pages inactive", "Pages asleep"), None),
        ("", None),
    ):
        command.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        command.chmod(0o755)
        assert runtime.available_bytes() == expected
    command.write_text("#!/bin/sh\nexit 1\n")
    assert runtime.available_bytes() is None


def test_the_limits_of_this_process_are_read() -> None:
    if not runtime.MEMBERSHIP.exists():
        pytest.skip("this system has no control groups")
    for group in runtime.control_groups():
        assert group.limit > 2**20
        assert group.left > 0
