"""A checkpoint of over 2 GB generates an image in a process that takes a third of that at most."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from neounify.checkpoint.save import save_model
from neounify.config.presets import BENCH
from neounify.model import NeoUnify
from neounify.text import byte_tokenizer

LIMIT = 700 * 2**20
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")

CHILD = """
import sys, warnings
warnings.simplefilter("ignore")
if sys.argv[1]:
    with open(sys.argv[1] + "/cgroup.procs", "w") as file:
        file.write(str(__import__("os").getpid()))
import neounify
memory = {"layers": {"resident_layers": 0}}.get(sys.argv[3], {})
pipe = neounify.load(sys.argv[2], memory=sys.argv[3], plan="ignore", **memory)
pixels = pipe.generate("a boat", width=64, height=64, steps=1, guidance=1.0).pixels
print(float(pixels.double().sum()))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture
def limited() -> Iterator[Path | None]:
    """A control group that may have LIMIT bytes; None where none can be made."""
    old = (V1 / "memory.limit_in_bytes").exists()
    group = (V1 if old else V2) / f"neounify-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(LIMIT))
    except OSError:
        if group.is_dir():
            group.rmdir()
        yield None
        return
    yield group
    group.rmdir()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "large"
    torch.manual_seed(0)
    config = BENCH.replace(hidden_size=640, num_layers=66)
    save_model(NeoUnify(config), folder, tokenizer=byte_tokenizer())
    assert (folder / "model.safetensors").stat().st_size > 2e9
    return folder


@pytest.mark.slow
def test_layers_fit_where_the_weights_do_not(large: Path, limited: Path | None) -> None:
    """Without a control group the process may have more, and takes no more."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status")

    def run(memory: str, group: Path | None) -> tuple[float, int]:
        command = [sys.executable, "-c", CHILD, str(group or ""), str(large), memory]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
        total, peak = done.stdout.split()
        return float(total), int(peak) * 1024

    expected, whole = run("all", None)
    total, peak = run("layers", limited)
    assert total == expected
    assert peak < LIMIT < whole / 3
