"""Initial weights of a run: by rows, the same on any number of ranks, never all at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from neounify.checkpoint import CheckpointFolder, save_model
from neounify.config.presets import SCENES
from neounify.distributed.ranks import Ranks
from neounify.distributed.shards import local
from neounify.model.neo import NeoUnify
from neounify.text.tokenizer import byte_tokenizer
from neounify.train.recipe import recipe_from_table
from neounify.train.setup import build_setup
from neounify.train.weights import (
    ChangedWeights,
    CheckpointWeights,
    FreshWeights,
    GrownWeights,
    Weights,
    new_model,
)
from support.models import TINY_CHANGES
from support.ranks import run_ranks

CONFIG = SCENES.replace(**TINY_CHANGES)
ALL = slice(None)


def saved(folder: Path, model: NeoUnify) -> CheckpointFolder:
    save_model(model, folder, tokenizer=byte_tokenizer())
    return CheckpointFolder.open(folder)


def sources(folder: Path) -> dict[str, Any]:
    """Functions that make each kind of initial weights."""
    half = saved(folder, new_model(CONFIG, 1).to(torch.bfloat16))
    more = CONFIG.replace(num_layers=5)
    old, new = byte_tokenizer(), byte_tokenizer(["a red circle"] * 9, 280)
    grown = CONFIG.replace(vocab_size=CONFIG.vocab_size + 40)
    return {
        "fresh": lambda: FreshWeights(CONFIG, 3),
        "stored": lambda: CheckpointWeights(half),
        "changed": lambda: ChangedWeights(CheckpointWeights(half), more, 3),
        "grown": lambda: GrownWeights(CheckpointWeights(half), grown, old, new),
    }


def values(weights: Weights, rows: slice = ALL) -> dict[str, torch.Tensor]:
    return {name: weights.read(name, rows) for name in weights.shapes}


@pytest.mark.parametrize("kind", ["fresh", "stored", "changed", "grown"])
@pytest.mark.parametrize("rows", [slice(0, 5), slice(7, 16), slice(31, 32), slice(32, 32)])
def test_rows_are_those_of_the_whole(tmp_path: Path, kind: str, rows: slice) -> None:
    make = sources(tmp_path)[kind]
    whole, part = values(make()), values(make(), rows)
    for name, value in whole.items():
        assert value.dtype == part[name].dtype == torch.float32
        assert torch.equal(value[rows], part[name]), name


def test_fresh_weights_are_drawn_in_the_order_of_a_model() -> None:
    """The values of torch.nn come first in the sequence of numbers, then those of each matrix."""
    torch.manual_seed(3)
    model = NeoUnify(CONFIG)
    first = model.embed_tokens.weight
    assert torch.equal(
        torch.empty(first.shape).normal_(std=0.5), new_model(CONFIG, 3).embed_tokens.weight
    )


def memory(field: str) -> int:
    """A line of this process's memory status, in bytes."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def build(folder: str) -> tuple[int, int]:
    """Bytes that a rank holds of a large checkpoint's model, and its peak while it reads them."""
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    for name in ("small", "large"):  # the first one imports what is needed
        model = {"checkpoint": str(Path(folder) / name)}
        stages = [{"name": "a", "steps": 1, "packs_per_step": 2, "data": [{"kind": "scenes"}]}]
        table = {"name": "r", "model": model, "parallel": {}, "stages": stages}
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what there is now
        before = memory("VmHWM")
        setup = build_setup(recipe_from_table(table), torch.device("cpu"), Path(folder), ranks)
        peak = memory("VmHWM") - before
    return sum(local(p).nbytes for p in setup.model.parameters()), peak


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_no_rank_holds_a_whole_checkpoint_in_memory(tmp_path: Path) -> None:
    config = SCENES.replace(hidden_size=640, num_layers=16)
    model = new_model(config, 0)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 200e6
    saved(tmp_path / "large", model)
    saved(tmp_path / "small", new_model(CONFIG, 0))
    for share, peak in run_ranks(build, str(tmp_path), ranks=2):
        assert share == pytest.approx(size / 2, rel=0.01)
        assert peak < 0.75 * size, f"{peak / size:.2f} of the model"
