"""The tests' own tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.workers import pytest_xdist_auto_num_workers

EXAMPLE = """
import pytest

@pytest.mark.skip(reason="one reason")
@pytest.mark.parametrize("n", range(3))
def test_marked(n): ...

def test_inside(): pytest.skip("another reason")

@pytest.mark.slow
def test_slow(): ...

def test_passes(): ...
"""


def run_pytest(folder: Path, *arguments: str) -> list[str]:
    """The lines that pytest writes about the tests in a folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.skips", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: x\n")
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_each_reason_of_skipping_has_a_line(tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_example.py").write_text(EXAMPLE)
    (tmp_path / "test_module.py").write_text(
        'import pytest\npytest.skip("no library", allow_module_level=True)\n'
    )
    lines = run_pytest(tmp_path, "-n", workers)
    assert sorted(line for line in lines if line.startswith("skipped ")) == [
        "skipped 1: another reason",
        "skipped 1: no library (all tests of test_module.py)",
        "skipped 1: slow: `.ci/run` runs them, and so does `pytest -m slow`",
        "skipped 3: one reason",
    ]


def test_slow_tests_run_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(EXAMPLE)
    lines = run_pytest(tmp_path, "-m", "slow")
    assert not any(line.startswith("skipped ") for line in lines)
    assert any("1 passed" in line for line in lines)
    lines = run_pytest(tmp_path, "test_example.py")
    assert any("2 passed" in line for line in lines)


@pytest.mark.parametrize(
    ("quota", "memory", "workers"),
    [("max 100000", 64, 8), ("250000 100000", 64, 3), ("max 100000", 8, 2), ("0 100000", 1, 1)],
)
def test_workers_for_cores_quota_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, memory: int, workers: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": memory * 2**30 // 4096}
    monkeypatch.setattr("support.workers.QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert pytest_xdist_auto_num_workers() == workers
