"""The tests' own tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.skips", *arguments, str(folder)]
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
