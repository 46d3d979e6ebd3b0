"""Rollouts in worker processes: the same bits, deaths, and ends of the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.errors import ConfigError
from neounify.post_train.workers import RolloutFailure
from support.post_training import BASE, LORA, built, described, metrics, run, state_tensors
from support.processes import children_of, runs

SHARED = {"prompts_per_rollout": 2, "rollout_workers": 2}
RUN = """
import sys
from pathlib import Path

from support.post_training import BASE, described
from train.test_trainer import trainer

if __name__ == "__main__":
    BASE.append(Path(sys.argv[1]))
    settings = {"prompts_per_rollout": 2, "rollout_workers": 2}
    trainer(Path(sys.argv[2]), described("nft", settings, steps=100_000)).run()
"""


@pytest.mark.parametrize(
    ("name", "lora"), [("flow-grpo", False), ("nft", True), ("story", False), ("joint", False)]
)
def test_workers_change_no_bit(tmp_path: Path, name: str, lora: bool) -> None:
    """Of two iterations, the second of which samples with weights that were trained."""
    stage: dict[str, Any] = {"steps": 4, **({"lora": LORA} if lora else {})}
    for workers in (0, 2):
        run(tmp_path / str(workers), name, {**SHARED, "rollout_workers": workers}, **stage)
    one, other = (state_tensors(tmp_path / str(workers), 4) for workers in (0, 2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert metrics(tmp_path / "0") == metrics(tmp_path / "2")
    assert not [child for child in active_children() if child.name.startswith("rollout")]


def test_rollouts_have_the_prompts_that_are_asked_for(tmp_path: Path) -> None:
    method = built(tmp_path, "nft", {"prompts_per_iteration": 7, "prompts_per_rollout": 2})
    cases = method.rollout_cases(3, 0)
    assert max(map(len, cases)) == 2
    assert all(len({bool(case.images) for case in some}) == 1 for some in cases)
    together = [case.prompt for group in method.cases(21, 7) for case in group]
    assert [case.prompt for some in cases for case in some] == together


def test_a_dead_worker_is_one_clear_error(tmp_path: Path) -> None:
    method = built(tmp_path, "nft", {**SHARED, "rollout_workers": 1})
    batches = method.batches(None)
    next(batches)
    [worker] = [child for child in active_children() if child.name.startswith("rollout")]
    with pytest.raises(RolloutFailure, match="rollout worker 0 failed: IndexError"):
        method._workers.sample([(0, 0, 0, 99)])
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RolloutFailure, match=r"worker 0 \(process \d+\) ended by signal 9"):
        method._workers.sample([(1, 0, 0, 0)])
    batches.close()
    assert not [child for child in active_children() if child.name.startswith("rollout")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_workers_end_with_the_trainer(tmp_path: Path, number: signal.Signals) -> None:
    script, folder = tmp_path / "run.py", tmp_path / "out"
    log = folder / "log.jsonl"
    script.write_text(RUN)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(script), str(BASE[0]), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _wait(lambda: "reward" in log.read_text() if log.is_file() else False)
        workers = children_of(process.pid)
        assert len(workers) >= 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        _, errors = process.communicate(timeout=120)
        assert "Process rollout" not in errors  # no traceback of a worker
        _wait(lambda: not any(runs(pid) for pid in workers))
    finally:
        process.kill()


def _wait(done: Any) -> None:
    end = time.monotonic() + 300
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("method", "stage", "message"),
    [
        ({"rollout_workers": 2}, {}, "give prompts_per_rollout, such as 2"),
        (SHARED, {"compile": True}, "leave compile out"),
        ({**SHARED, "rollout_workers": 9}, {}, r"9 processes for \d rollouts of an iteration"),
        ({"rollout_workers": -1}, {}, "rollout_workers"),
    ],
)
def test_workers_that_cannot_be(
    method: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        described("nft", method, **stage)
