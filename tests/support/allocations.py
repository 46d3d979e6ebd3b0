"""Memory that tensors take on the CPU, counted by the profiler of torch instead of measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def allocations(work: Callable[[], object]) -> list[int]:
    """Bytes of every block that `work` takes, in order, and below 0 of every one it gives back.

    Buffers inside the operations of torch are among them, those inside oneDNN are not. Blocks that
    were there before are not counted when they are given back.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def peak(blocks: list[int]) -> int:
    """The most bytes that blocks hold at a time, over those held before."""
    return max(accumulate(blocks))
