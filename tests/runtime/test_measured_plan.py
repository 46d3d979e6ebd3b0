"""The memory plan of clips against the resident size of a process, on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neounify.checkpoint import CheckpointFolder
from neounify.checkpoint.sizes import kept_weights
from neounify.runtime.memory_plan import Task, peak_bytes, working_bytes
from neounify.tasks.clips import clip_question
from support.pixelumm import CONFIG, saved

CHILD = """
import sys
import numpy as np, PIL.Image, torch
import neounify
from neounify.runtime.rates import process_bytes
from neounify.tasks.clips import Frames
from neounify.tasks.video import in_tubes

def work(frames, width, height):
    if kind == "generate":
        pipe.generate("a boat", frames=frames, width=width, height=height, steps=3)
        return
    image = PIL.Image.fromarray(np.zeros((height, width, 3), np.uint8))
    images, times = [image] * frames, [n / 4 for n in range(frames)]
    clip = Frames(images, times) if kind == "frames" else in_tubes(pipe.config, images, times)
    pipe.chat("What?", video=clip, max_new_tokens=1)

kind = sys.argv[1]
print(process_bytes())
pipe = neounify.load(sys.argv[2])
work(4, 32, 32)  # what the libraries take at their first use
work(*map(int, sys.argv[3:]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
MODEL = CONFIG.replace(hidden_size=64, num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("measured") / "model", MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["generate", "frames", "tubes"])
def test_peaks_of_clips_are_those_of_the_plan(kind: str, folder: Path) -> None:
    """At most 3 % below, 20 % above: a clip of 8,640 tokens, or frames of 37,632.

    What the libraries take at their first use differs: 9 % above were measured.

    Clips to look at take less on some processors, by threads and what else runs: tubes from 0.685
    to 0.761 GB, frames from 0.626 to 0.770, planned with a process of 0.30 GB 0.804 and 0.749. One
    of 0.38 GB, as the largest measured, is 32 % above the least of them: 35 % for those.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status")
    frames, width, height = (32, 480, 288) if kind == "generate" else (48, 448, 448)
    command = [sys.executable, "-c", CHILD, kind, str(folder), *map(str, (frames, width, height))]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    first, last = done.stdout.split()
    process, measured = float(first), int(last) * 1024
    checkpoint = CheckpointFolder.open(folder)
    task = Task(kind="t2v", frames=frames, width=width, height=height, branches=2, prompt=30)
    if kind != "generate":
        task = clip_question(MODEL, frames, (width, height), tubes=kind == "tubes")
    weights = kept_weights(checkpoint, torch.float32).weights
    working = working_bytes(MODEL, task, 4)
    predicted = peak_bytes(weights, "all", working, unified=True, process=process)
    print(
        f"{kind}: measured {measured / 1e9:.3f} GB, planned {predicted / 1e9:.3f}, "
        f"of which the process {process / 1e9:.3f}"
    )
    assert 0.97 <= predicted / measured <= (1.2 if kind == "generate" else 1.35)
