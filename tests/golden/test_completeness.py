"""No recorded array of the second family is left out by the tests that compare them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from support.golden import golden_path, needs_golden
from support.golden_reads import READS

HERE = Path(__file__).parent
FILES = ("test_clips", "test_painting", "test_pixelumm", "test_solvers", "test_training")


@needs_golden
@pytest.mark.slow
def test_every_recorded_array_is_read(tmp_path: Path) -> None:
    """By the tests of `FILES`, which run once more, each array noted as it is read."""
    reads = tmp_path / "reads.json"
    tests = [str(HERE / f"{name}.py") for name in FILES]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "support.golden_reads", *tests],
        cwd=HERE.parents[1],
        env={**os.environ, READS: str(reads), "PYTHONPATH": str(HERE.parent)},
        check=True,
    )
    recorded: set[str] = set()
    for file in golden_path("pixelumm", "fixtures").rglob("*.safetensors"):
        with safe_open(file, "pt") as arrays:
            names = arrays.keys()
        recorded |= {f"{file.parent.name}/{file.stem}/{name}" for name in names}
    assert recorded
    assert sorted(recorded - set(json.loads(reads.read_text(encoding="utf-8")))) == []
