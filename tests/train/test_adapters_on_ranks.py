"""Adapters over weights that are cut over ranks, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from neounify.lora.layers import HALVES
from neounify.pipeline import load
from neounify.train.state import saved_states
from support.parallel_runs import SPARSE, losses, numpy, one_stage, recipe, this_rank, trainer
from support.ranks import run_ranks

LORA = {"rank": 2, "modules": ["attention", "mlp", "linear1", "lm_head"]}
TWO_STAGES = {
    "stages": [
        {"name": "adapters", "steps": 3, "packs_per_step": 4, "lora": {"rank": 2}},
        {"name": "all", "steps": 1, "packs_per_step": 4},
    ]
}
CASES: dict[str, dict[str, Any]] = {
    "everywhere": one_stage(lora={**LORA, "dropout": 0.25}, checkpoint_activations=True),
    "experts": {"model": SPARSE, **TWO_STAGES},
    "rows": {"parallel": {"sequence": 2}, **one_stage(lora=LORA)},
    "moved": TWO_STAGES,
}


def train(folder: Path, case: str, stop_after: int | None = None) -> dict[str, Any]:
    """The weights behind a case, from its newest state on, and which were cut in training."""
    changes = CASES[case]
    if this_rank().size == 1:
        changes = {**changes, "parallel": {}}
    # A larger eps: gradients near zero would make steps of a whole learning rate.
    optimizer = {"name": "adamw", "learning_rate": 1e-3, "eps": 1e-5}
    changes = {"defaults": {**changes.get("defaults", {}), "optimizer": optimizer}, **changes}
    training = trainer(folder / case, recipe(**changes), this_rank())
    cut: dict[str, bool] = {}
    original = training._step

    def step(*arguments: Any) -> Any:
        named = training.model.named_parameters()
        if training.progress.stage == 0:
            cut.update({n: isinstance(p, DTensor) for n, p in named if p.requires_grad or p.ndim})
        return original(*arguments)

    training._step = step  # type: ignore[assignment]
    if states := saved_states(training.states):
        training.resume(states[-1])
    training.run(stop_after=stop_after)
    return {"weights": {n: numpy(p) for n, p in training.model.named_parameters()}, "cut": cut}


def on_ranks(folder: str) -> dict[str, Any]:
    at = Path(folder)
    results = {case: train(at / "two", case) for case in CASES if case != "moved"}
    train(at / "moved", "moved", stop_after=1)
    train(at / "moved", "moved", stop_after=2)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(on_ranks, str(folder), ranks=2, seconds=400.0)


def check(one: Path, other: Path) -> None:
    mine, theirs = losses(one), losses(other)
    assert [x["step"] for x in mine] == [x["step"] for x in theirs]
    for a, b in zip(mine, theirs, strict=True):
        for name in ("text/loss", "image/loss", "gradient_norm"):
            assert a.get(name) == pytest.approx(b.get(name), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "moved"])
def test_adapters_train_on_two_ranks_as_on_one(
    folder: Path, two: list[dict[str, Any]], case: str
) -> None:
    alone = train(folder / "alone", case)
    check(folder / "alone" / case, folder / "two" / case)
    for rank in two:
        whole = {name for name, cut in rank[case]["cut"].items() if not cut}
        assert whole
        assert all(name.endswith(HALVES) for name in whole)
        assert rank[case]["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            assert np.abs(rank[case]["weights"][name] - weight).max() < 1e-5, name
    exported = load(folder / "two" / case / "model").model.state_dict()
    for name, weight in load(folder / "alone" / case / "model").model.state_dict().items():
        torch.testing.assert_close(exported[name], weight, atol=1e-5, rtol=0)


def test_a_run_with_adapters_moves_from_two_ranks_to_one(
    folder: Path, two: list[dict[str, Any]]
) -> None:
    moved = train(folder / "moved", "moved")
    alone = train(folder / "alone", "moved")
    check(folder / "alone" / "moved", folder / "moved" / "moved")
    for name, weight in alone["weights"].items():
        assert np.abs(moved["weights"][name] - weight).max() < 1e-5, name
