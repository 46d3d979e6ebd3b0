"""Process settings."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neounify.runtime import process

MEASURE = """
import resource, torch
from neounify.runtime import keep_freed_memory
assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (1, 4, 16) * 10:
        torch.zeros(megabytes * 2**18).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
PAGES = 2 * 10 * (1 + 4 + 16) * 2**20 // 4096
"""What the tensors of one round occupy."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_needs_no_new_pages() -> None:
    # In a separate process: the setting is the whole process's.
    command = [sys.executable, "-c", MEASURE]
    faults = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Without the setting nearly all of them; some where the system takes idle ones back.
    assert int(faults) < 0.1 * PAGES


def test_the_memory_of_the_process_is_that_before_its_first_model() -> None:
    """Asked for a second time, with tensors that came later, it is the same."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc/self/statm")
    process.own_memory.cache_clear()
    before = process.own_memory()
    assert 0 < before.private < before.resident
    later = torch.ones(2**26)
    assert process.own_memory() == before
    process.own_memory.cache_clear()
    after = process.own_memory()
    assert after.private - before.private == pytest.approx(4 * len(later), rel=0.2)
    process.own_memory.cache_clear()


def test_the_processor_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_CPU_INFO", tmp_path / "cpuinfo")
    assert process.processor_name() == (platform.processor() or platform.machine())
    (tmp_path / "cpuinfo").write_text("flags\t: a b\nmodel name\t: Some CPU 9: fast \n")
    assert process.processor_name() == "Some CPU 9: fast"
