"""`torchrun -m neounify train`: one program on many ranks, and one message for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.rank_recipes import write_recipe

pytestmark = pytest.mark.slow


def torchrun(
    folder: Path, packs: int, *options: str, command: str = "train"
) -> subprocess.CompletedProcess[str]:
    recipe = write_recipe(folder / "r.toml", steps=2, packs=packs, workers=1, sample_every=2)
    out = ("--out", str(folder / "out")) if command == "train" else ()
    program = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "neounify", command, str(recipe), *out, *options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        program, env=environment, capture_output=True, text=True, timeout=540, check=False
    )


def test_two_ranks_train(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1
    lines = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(len(line["rank_memory_gb"]) == 2 for line in steps)
    assert all(line["slowest_over_mean"] >= 1 for line in steps)
    assert (tmp_path / "out" / "samples" / "step-00000002.png").is_file()
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 3)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "packs_per_step (3) must be a multiple of the 2 ranks, such as 4" in said[0]
    assert not (tmp_path / "out" / "states").exists()


def test_the_doctor_examines_a_stage_on_two_ranks(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "--seconds", "5", "--json", command="doctor")
    assert done.returncode == 0, done.stderr
    findings = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert findings["gradients"]["good"]
    assert findings["freezing"]["good"]
    assert "generation" in findings
