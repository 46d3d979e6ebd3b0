"""How long a call takes, and what the machine itself can do."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from neounify.model.stream import frozen_linear, onednn_is_faster
from neounify.runtime.process import processor_name

WARM_UPS = 2
RUNS = 7


def median_seconds(call: Callable[[], object], runs: int = RUNS) -> float:
    """Median wall-clock seconds of a call, after warm-up calls that do not count."""
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def processor_seconds(call: Callable[[], object], runs: int = RUNS) -> float:
    """Least processor seconds of a call over all threads, which other programs disturb less."""
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


@dataclass(frozen=True)
class Machine:
    """What one dtype reaches here: multiply-adds count as two operations."""

    matmul_flops: float
    """Operations per second of a 2048³ matrix product, by the library that inference uses."""
    read_bytes: float
    """Bytes per second at which a large matrix-vector product reads its matrix."""
    read_bytes_processor: float
    """The same per second of processor time."""


@torch.inference_mode()
def measure_machine(dtype: torch.dtype) -> Machine:
    a = torch.randn(2048, 2048).to(dtype)
    layer = torch.nn.Linear(2048, 2048, bias=False, dtype=dtype)
    product = partial(frozen_linear, layer) if onednn_is_faster() else layer
    weight, vector = torch.randn(16_384, 4096).to(dtype), torch.randn(4096).to(dtype)
    return Machine(
        matmul_flops=2 * 2048**3 / median_seconds(lambda: product(a)),
        read_bytes=weight.nbytes / median_seconds(lambda: weight @ vector),
        read_bytes_processor=weight.nbytes / processor_seconds(lambda: weight @ vector),
    )


def describe_machine() -> dict[str, object]:
    """The hardware and software a result belongs to."""
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
