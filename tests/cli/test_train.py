"""`neounify train` as a process: what a signal leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
name = "stopped"
workers = 0
[model]
preset = "scenes"
tokenizer = { samples = 50 }
[model.changes]
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 2
head_dim = 16
flow_head_width = 32
[[stages]]
name = "a"
steps = 100000
log_every = 1
method = { tokens_per_pack = 600 }
[[stages.data]]
kind = "scenes"
world = "easy"
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_the_way_to_resume(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, and SIGTERM, with which schedulers end jobs."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "neounify", "train", "recipe.toml", "--out", "run"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell in the background hands an ignored SIGINT down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") > 2:
            break
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "--resume auto" in output
    assert "Traceback" not in output
