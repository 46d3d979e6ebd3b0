"""The process itself in the plan of a model on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neounify.checkpoint.fit import fit_memory, fit_two, peaks
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.sizes import kept_weights
from neounify.errors import MemoryPlanError
from neounify.model import NeoUnify
from neounify.runtime.memory_plan import default_task, peak_bytes, working_bytes
from neounify.runtime.plan import ExecutionPlan
from neounify.runtime.process import OwnMemory
from neounify.runtime.rates import FIRST_USE
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    for module in ("plan", "rates"):
        monkeypatch.setattr(f"neounify.runtime.{module}.available_bytes", lambda: int(size))


def test_the_process_counts_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own pages are room for the model, pages of its files only as far as memory is free."""
    memory = OwnMemory(resident=int(4e9), private=int(3e9))
    monkeypatch.setattr("neounify.runtime.rates.own_memory", lambda: memory)
    folder = write_checkpoint(tmp_path / "model", SMALL, random_weights(SMALL))
    checkpoint, cpu = CheckpointFolder.open(folder), torch.device("cpu")
    kept = kept_weights(checkpoint, torch.float32)
    working = working_bytes(SMALL, default_task(SMALL), 4)
    model = peak_bytes(kept.weights, "all", working, unified=True, process=0)
    peak = 4e9 + FIRST_USE + model
    free(monkeypatch, peak - 3e9 + 2)
    assert fit_memory(checkpoint, kept, cpu, "all").peak == pytest.approx(peak)
    free(monkeypatch, peak - 3e9 - 2)
    with pytest.raises(MemoryPlanError, match=f"peaks at {peak / 1e9:.1f} GB"):
        fit_memory(checkpoint, kept, cpu, "all")
    # A second model is in the same process.
    free(monkeypatch, peak + model - 3e9 + 2)
    assert [one.memory for one in fit_two([checkpoint] * 2, [kept] * 2, cpu)] == ["all", "all"]
    shown = peaks(NeoUnify(SMALL), None, ExecutionPlan(), kept)
    assert f" peaks at {peak / 1e9:.1f} GB by the plan" in shown
