"""Process settings."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch
from neounify.runtime import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(4 * 2**20).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_needs_no_new_pages() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", MEASURE, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < 0.1 * faults("returned")
