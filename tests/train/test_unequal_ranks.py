"""Two ranks of which one sees only images to generate and the other only text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neounify.data.sources import Mixture
from support.parallel_runs import losses, numpy, recipe, this_rank, trainer
from support.ranks import run_ranks

SECONDS = 300.0
BETWEEN = 300
"""Samples of the source between two draws, among which one of the wanted task is found."""


def by_parity(mixture: Mixture, index: int) -> tuple[int, int]:
    """Even draws, which are those of rank 0, take images to generate, odd ones text."""
    wanted = "text" if index % 2 else "t2i"
    numbers = range(index * BETWEEN, (index + 1) * BETWEEN)
    return 0, next(n for n in numbers if mixture.sources[0][n].task == wanted)


def train(folder: str) -> dict[str, Any]:
    """The weights after three steps, and the tasks that this rank has seen."""
    tasks: list[str] = []
    original = Mixture.__getitem__

    def seen(mixture: Mixture, index: int) -> Any:
        sample = original(mixture, index)
        tasks.append(sample.task)
        return sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixture, "describe", by_parity)
        training = trainer(Path(folder), recipe(), this_rank())
        patch.setattr(Mixture, "__getitem__", seen)
        training.run()
    weights = {name: numpy(p) for name, p in training.model.named_parameters()}
    return {"weights": weights, "tasks": sorted(set(tasks))}


def test_a_rank_without_images_and_one_without_text(tmp_path: Path) -> None:
    alone = train(str(tmp_path / "alone"))
    ranks = run_ranks(train, str(tmp_path / "two"), ranks=2, seconds=SECONDS)
    assert alone["tasks"] == ["t2i", "text"]
    for one, two in zip(losses(tmp_path / "alone"), losses(tmp_path / "two"), strict=True):
        for name in ("text/loss", "image/loss", "gradient_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-6, abs=1e-6)
    for name, weight in alone["weights"].items():
        assert np.array_equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        assert np.abs(ranks[0]["weights"][name] - weight).max() < 1e-5, name
