"""Training on many ranks against one process on the same packs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from neounify.distributed.ranks import Ranks
from neounify.model.parts import STREAMS
from neounify.pipeline import load
from neounify.train import supervised
from neounify.train.optim import OptimizerConfig, OptimizerSet
from neounify.train.state import saved_states
from support.parallel_runs import CASES, losses, numpy, recipe, this_rank, train, trainer
from support.ranks import run_ranks

MOVED = ("moved", "moved experts")
COPIES = {
    "copies": "dense",
    "rows of copies": "dense",
    "copies of experts": "sparse",
    "experts of four": "sparse",
}
"""Cases of four ranks, and the case of one process that they are compared with."""
ON_FOUR = (*COPIES, *MOVED)
SLOW = ("compiled",)
"""Cases of tests marked slow, on ranks of their own."""
ROUNDED = {"muon": (1e-4, 1e-2), "experts muon": (1e-4, 1e-2), "bfloat16": (2e-2, 1e-2)}
"""Bounds of losses and weights where products are rounded to bfloat16."""
SECONDS = 540.0


def on_two_ranks(folder: str) -> dict[str, Any]:
    """Every quick case of two ranks, and Muon by itself."""
    results: dict[str, Any] = {
        case: train(Path(folder) / case, case) for case in CASES if case not in (*ON_FOUR, *SLOW)
    }
    results["owners"] = muon_on_owners()
    results["spoiled"] = spoiled(Path(folder) / "spoiled")
    return results


def slow_on_two_ranks(folder: str) -> dict[str, Any]:
    return {case: train(Path(folder) / case, case) for case in SLOW}


def first_steps(folder: str) -> None:
    for case in MOVED:
        train(Path(folder) / case, case, stop_after=2)


def on_four_ranks(folder: str) -> dict[str, Any]:
    moved = {case: train(Path(folder) / case, case, stop_after=4) for case in MOVED}
    return {**{case: train(Path(folder) / case, case) for case in COPIES}, **moved}


def muon_on_owners() -> dict[str, Any]:
    """Weights after steps of Muon, whole and cut over the ranks, from the same gradients."""
    shapes: dict[str, tuple[int, ...]] = {
        "layers.0.a": (5, 7),
        "layers.0.b": (1, 3),
        "layers.1.a": (16, 4),
    }
    # Stacks of matrices, cut by matrices and by rows.
    shapes |= {"layers.1.b": (3, 8, 4), "layers.2.b": (2, 4, 6)}
    mesh = init_device_mesh("cpu", (this_rank().size,))
    numbers = torch.Generator().manual_seed(0)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        by_rows = tensor.ndim == 3 and len(tensor) == 2
        return distribute_tensor(tensor, mesh, [Shard(int(by_rows))], src_data_rank=None)

    whole = {n: Parameter(torch.randn(s, generator=numbers)) for n, s in shapes.items()}
    parts = {n: Parameter(cut(p.detach().clone())) for n, p in whole.items()}
    config = OptimizerConfig(name="muon", learning_rate=0.1, weight_decay=0.1)
    sets = [OptimizerSet(parameters, config) for parameters in (whole, parts)]
    for _ in range(3):
        for name, parameter in whole.items():
            parameter.grad = torch.randn(parameter.shape, generator=numbers)
            parts[name].grad = cut(parameter.grad.clone())
        for one in sets:
            one.step()
    return {n: (p.detach().numpy(), numpy(parts[n])) for n, p in whole.items()}


def spoiled(folder: Path) -> dict[str, int]:
    """A run in which one rank's loss is NaN in the second step: counts of its progress."""
    original = supervised.loss_of
    training = trainer(folder, recipe(), this_rank())

    def loss_of(*arguments: Any) -> torch.Tensor:
        factor = float("nan") if training.progress.step == 1 and this_rank().rank == 1 else 1.0
        return original(*arguments) * factor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "loss_of", loss_of)
        training.run()
    return {"nonfinite": training.progress.nonfinite, "step": training.progress.step}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


class Alone(dict[str, dict[str, Any]]):
    """Weights of one process by case, which is trained when it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, case: str) -> dict[str, Any]:
        self[case] = train(self.folder / case, case)
        return self[case]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    return Alone(folder / "alone")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, str(folder / "two"), ranks=2, seconds=SECONDS)


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    run_ranks(first_steps, str(folder / "four"), ranks=2, seconds=SECONDS)
    return run_ranks(on_four_ranks, str(folder / "four"), ranks=4, seconds=SECONDS)


COUNTED = ("step", "samples", "images", "tokens")
MEANS = ("text/loss", "image/loss", "gradient_norm")


def check_logs(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    """The logs of two runs: the same samples, and means within a relative tolerance."""
    mine, theirs = losses(one), losses(other)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert [a[name] for name in COUNTED] == [b[name] for name in COUNTED]
        for name in MEANS:
            assert a.get(name) == pytest.approx(b.get(name), rel=tolerance, abs=tolerance)


def check_weights(expected: dict[str, Any], ranks: list[dict[str, Any]], bound: float) -> None:
    """All ranks have the same bits, and the weights of one process within a bound."""
    for name, weight in expected.items():
        assert all(np.array_equal(ranks[0][name], other[name]) for other in ranks[1:]), name
        assert np.abs(ranks[0][name] - weight).max() < bound, name


@pytest.mark.parametrize("case", [c for c in CASES if c not in (*ON_FOUR, *SLOW, *ROUNDED)])
def test_two_ranks_train_as_one(
    folder: Path, alone: Alone, two: list[dict[str, Any]], case: str
) -> None:
    check_weights(alone[case], [rank[case] for rank in two], 1e-5)
    check_logs(alone.folder / case, folder / "two" / case)


@pytest.mark.parametrize("case", ROUNDED)
def test_two_ranks_train_as_one_but_for_rounding(
    folder: Path, alone: Alone, two: list[dict[str, Any]], case: str
) -> None:
    of_losses, of_weights = ROUNDED[case]
    check_weights(alone[case], [rank[case] for rank in two], of_weights)
    check_logs(alone.folder / case, folder / "two" / case, of_losses)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_compiled_layers_on_two_ranks(folder: Path, alone: Alone, case: str) -> None:
    ranks = run_ranks(slow_on_two_ranks, str(folder / "slow"), ranks=2, seconds=SECONDS)
    check_weights(alone["dense"], [rank[case] for rank in ranks], 1e-5)
    check_logs(alone.folder / "dense", folder / "slow" / case)


@pytest.mark.parametrize("case", ["sparse", "experts", "experts muon"])
def test_tokens_of_experts_are_counted_over_the_ranks(
    folder: Path, alone: Alone, two: list[dict[str, Any]], case: str
) -> None:
    """Each token once for each of its experts, also where layers are computed again."""
    assert alone[case].keys() == two[0][case].keys()
    mine, theirs = (expert_tokens(at / case) for at in (alone.folder, folder / "two"))
    assert mine == theirs
    totals = [line["tokens"] for line in losses(folder / "two" / case)]
    for number, line in enumerate(theirs):
        layers = [sum(sum(line[f"{stream}.{n}"]) for stream in STREAMS) for n in range(2)]
        tokens = totals[number] - (totals[number - 1] if number else 0)
        assert layers == [2 * tokens] * 2
    last = losses(folder / "two" / case)[-1]
    of_layers = [counts for name, counts in theirs[-1].items() if name.startswith("gen.")]
    busiest = max(4 * max(counts) / sum(counts) for counts in of_layers)
    assert last["experts/gen/busiest_over_mean"] == pytest.approx(busiest)


def expert_tokens(folder: Path) -> list[dict[str, list[int]]]:
    lines = [json.loads(line) for line in (folder / "experts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    return [line["tokens"] for line in lines]


def test_matrices_dealt_out_to_owners_have_the_bits_of_one_rank(two: list[dict[str, Any]]) -> None:
    for rank in two:
        for whole, parts in rank["owners"].values():
            if whole.ndim == 2:
                assert np.array_equal(whole, parts)
            else:  # matrices of a stack are multiplied together, by other kernels
                np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_a_loss_of_one_rank_that_is_not_finite_is_skipped_by_all(two: list[dict[str, Any]]) -> None:
    assert [rank["spoiled"] for rank in two] == [{"nonfinite": 1, "step": 3}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", COPIES)
def test_copies_of_a_mesh_train_as_one(
    folder: Path, alone: Alone, four: list[dict[str, Any]], case: str
) -> None:
    check_weights(alone[COPIES[case]], [rank[case] for rank in four], 1e-5)
    check_logs(alone.folder / COPIES[case], folder / "four" / case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MOVED)
def test_a_run_moves_from_two_ranks_to_four_and_to_one(
    folder: Path, alone: Alone, four: list[dict[str, Any]], case: str
) -> None:
    at = folder / "four" / case
    states = [path.name for path in saved_states(at / "states")]
    assert states == ["step-00000002", "step-00000004"]
    shards = sorted(path.name for path in (at / "states" / states[-1] / "model").iterdir())
    assert len(shards) == 4
    facts = json.loads((at / "states" / states[-1] / "state.json").read_text())
    assert all(len(known["sha256"]) == 64 for known in facts["files"].values())
    weights = train(at, case)
    check_weights(alone[case], [weights], 1e-5)
    check_logs(alone.folder / case, at)
    exported = dict(load(at / "model").model.named_parameters())
    before = dict(load(alone.folder / case / "model").model.named_parameters())
    for name, weight in before.items():
        torch.testing.assert_close(exported[name], weight, atol=1e-5, rtol=0)


def test_one_process_is_one_rank() -> None:
    assert this_rank() == Ranks()
