"""Peak resident memory: loading, long prefills, memory by stream, and the plan of each mode.

Each in a fresh process. `python -m benchmarks.memory plan` measures the plan alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import neounify
from benchmarks.figure import Figure
from benchmarks.models import new_cache, random_ids
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.save import save_model
from neounify.checkpoint.sizes import kept_weights
from neounify.config import ModelConfig
from neounify.config.presets import BENCH, TINY
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.errors import SizeWarning
from neounify.model import Image, NeoUnify, Text
from neounify.runtime.memory_plan import Resident, Task, peak_bytes, working_bytes
from neounify.runtime.rates import process_bytes
from neounify.text import byte_tokenizer
from neounify.text.forms import default_system_message
from neounify.text.template import image_prompt

LONG = 32_768
PROMPT = "a boat"
GB = 1e9


def figures() -> Iterator[Figure]:
    yield from _long_prefill()
    with tempfile.TemporaryDirectory() as folder:
        yield from _loading(_write_checkpoint(Path(folder) / "one", layers=30))
        two = _write_checkpoint(Path(folder) / "two", layers=66)
        yield from _by_stream(two)
        yield from against_plan(two)


def _write_checkpoint(folder: Path, layers: int) -> Path:
    """A float32 checkpoint: 30 layers are over 1 GB, 66 over 2 GB."""
    config: ModelConfig = BENCH.replace(hidden_size=640, num_layers=layers)
    torch.manual_seed(0)
    model = NeoUnify(config)
    tokenizer = byte_tokenizer()
    save_model(model, folder, tokenizer=tokenizer)
    return folder


def _loading(folder: Path) -> Iterator[Figure]:
    kept = _checkpoint_bytes(folder)
    for dtype, size in (("float32", kept), ("bfloat16", kept // 2)):
        result = _in_fresh_process("load", str(folder), dtype)
        note = f"{size / GB:.2f} GB kept" + (", mapped" if dtype == "float32" else "")
        yield Figure(
            name="loading a checkpoint, time",
            dtype=dtype,
            mode="",
            value=result["seconds"],
            unit="s",
            note=note,
        )
        yield Figure(
            name="loading and touching all weights, peak memory",
            dtype=dtype,
            mode="",
            value=result["peak"] / GB,
            unit="GB",
            share=None,
            aim="1.1 × the bytes kept",
            met=result["peak"] <= 1.1 * size,
            note=f"×{result['peak'] / size:.3f}",
        )


def _by_stream(folder: Path) -> Iterator[Figure]:
    size = _checkpoint_bytes(folder)
    peaks = {}
    for memory in ("all", "stream"):
        result = _in_fresh_process("paint", str(folder), memory)
        peaks[memory] = result["peak"]
        yield Figure(
            name=f"generating 256² with memory={memory!r}, peak memory",
            dtype="float32",
            mode="",
            value=result["peak"] / GB,
            unit="GB",
            aim="little over half" if memory == "stream" else "",
            met=result["peak"] <= 0.6 * size if memory == "stream" else None,
            note=f"{result['peak'] / size:.2f} of a checkpoint of {size / GB:.2f} GB, "
            f"{result['seconds']:.1f} s",
        )


@dataclass(frozen=True)
class Planned:
    """One generation: mode, resident layers, side of the image, preset, dtype of activations."""

    memory: str
    resident: int = 0
    side: int = 256
    quantise: str = ""
    dtype: str = "float32"

    @property
    def label(self) -> str:
        layers = f", {self.resident} layers resident" if self.memory == "layers" else ""
        preset = f", quantise={self.quantise!r}" if self.quantise else ""
        return f"generating {self.side}² with memory={self.memory!r}{layers}{preset}, resident size"


PLANNED = (
    Planned("all"),
    Planned("stream"),
    Planned("layers"),
    Planned("layers", 22),
    Planned("layers", side=1024),
    *(Planned(mode, quantise="int8", dtype="bfloat16") for mode in ("all", "stream", "layers")),
)


def against_plan(folder: Path) -> Iterator[Figure]:
    """Resident size at the peak against the plan's, of a float32 checkpoint over 2 GB."""
    size = _checkpoint_bytes(folder)
    for run in PLANNED:
        result = _in_fresh_process(
            "paint",
            str(folder),
            run.memory,
            str(run.resident),
            str(run.side),
            run.quantise,
            run.dtype,
        )
        measured = result["before"] + result["peak"]
        predicted = _predicted(folder, run, result["process"])
        ratio = predicted / measured
        yield Figure(
            name=run.label,
            dtype=run.dtype,
            mode="",
            value=measured / GB,
            unit="GB",
            aim="plan within 10 %, at most 3 % below",
            met=0.97 <= ratio <= 1.1,
            note=f"planned {predicted / GB:.3f} GB, {100 * (ratio - 1):+.1f} %, of which the "
            f"process {result['process'] / GB:.3f}, {result['seconds']:.0f} s; "
            f"{result['peak'] / size:.2f} of the checkpoint over the process",
        )


def _predicted(folder: Path, run: Planned, process: float) -> float:
    """Bytes of the plan, with the process as it measured itself before its first weight."""
    checkpoint = CheckpointFolder.open(folder)
    dtype: torch.dtype = getattr(torch, run.dtype)
    kept = kept_weights(checkpoint, dtype, quantise=run.quantise or None)
    prompt = image_prompt(
        byte_tokenizer(), PROMPT, system=default_system_message(), think=False
    ).ids([], 0)
    task = Task(width=run.side, height=run.side, branches=2, prompt=len(prompt))
    working = working_bytes(checkpoint.config, task, dtype.itemsize)
    layers: Resident = {"und": run.resident, "gen": run.resident}
    return peak_bytes(
        kept.weights,
        run.memory,  # type: ignore[arg-type]
        working,
        layers,
        unified=True,
        process=process,
    )


def _long_prefill() -> Iterator[Figure]:
    for length in (LONG // 4, LONG // 2, LONG):
        result = _in_fresh_process("prefill", str(length))
        yield Figure(
            name=f"prefill of {length} tokens with one image, peak memory",
            dtype="float32",
            mode="",
            value=result["peak"] / GB,
            unit="GB",
            aim="linear",
            note=f"{result['peak'] / length / 1e3:.0f} kB per token, {result['seconds']:.1f} s",
        )


def _checkpoint_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _in_fresh_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _load(folder: str, dtype: str) -> float:
    start = time.perf_counter()
    pipe = neounify.load(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    for parameter in pipe.model.parameters():
        parameter.flatten()[:: 4096 // parameter.element_size()].float().sum()
    return seconds


def _paint(
    folder: str,
    memory: str,
    resident: str = "0",
    side: str = "256",
    quantise: str = "",
    dtype: str = "float32",
) -> float:
    layers = int(resident) if memory == "layers" else None
    pipe = neounify.load(
        folder,
        dtype=dtype,
        memory=memory,  # type: ignore[arg-type]
        resident_layers=layers,
        quantise=quantise or None,
    )
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SizeWarning)
        pipe.generate(PROMPT, width=int(side), height=int(side), steps=2)
    return time.perf_counter() - start


@torch.inference_mode()
def _prefill(length: str) -> float:
    tokens = int(length)
    model = NeoUnify(BENCH).eval()
    spans = (Text(1024), Image(16, 16), Text(tokens - 1024 - 256))
    ids = random_ids(model, tokens - 256)
    start = time.perf_counter()
    forward_und(
        model, [ModelInput(new_cache(model, tokens), spans, ids, [torch.randn(3, 512, 512)])]
    )
    return time.perf_counter() - start


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not in /proc/self/status; this benchmark needs Linux")


def _warm_up() -> None:
    """Use everything once with a toy, so that the libraries' own memory does not count."""
    with tempfile.TemporaryDirectory() as folder:
        neounify.Pipeline(NeoUnify(TINY), byte_tokenizer()).save(folder)
        for dtype in ("float32", "bfloat16"):
            pipe = neounify.load(folder, dtype=dtype)
            pipe.generate("a boat", width=64, height=64, steps=2)


def _main(task: str, *arguments: str) -> None:
    """Run one task and print its seconds, the resident bytes it added at its peak, those before it.

    And those of the process, as a plan measures them.
    """
    tasks: dict[str, Callable[..., float]] = {"load": _load, "paint": _paint, "prefill": _prefill}
    process = process_bytes()
    _warm_up()
    before = _resident("VmRSS")
    seconds = tasks[task](*arguments)
    peak = _resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "peak": peak, "before": before, "process": process}))


def _plan_table() -> None:
    """Print the figures of `against_plan` alone."""
    with tempfile.TemporaryDirectory() as folder:
        for figure in against_plan(_write_checkpoint(Path(folder) / "two", layers=66)):
            met = "as planned" if figure.met else "NOT as planned"
            print(f"{figure.name}: {figure.value:.3f} GB, {figure.note}: {met}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["plan"]:
        _plan_table()
    else:
        _main(*sys.argv[1:])
