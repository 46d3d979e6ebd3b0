"""States of one rank and of several, read by slices and exported without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.checkpoint import CheckpointFolder
from neounify.distributed.shards import local, place
from neounify.distributed.states import StoredTensors
from neounify.errors import CheckpointError
from neounify.train import export
from neounify.train.export import export_state
from neounify.train.recipe import Recipe
from neounify.train.state import load_state, saved_states
from support.parallel_runs import SPARSE, one_stage, recipe, this_rank, trainer
from support.ranks import run_ranks

ADAPTERS = {"rank": 2, "modules": ["q_proj", "gate_proj", "down_proj", "lm_head"]}
CASES: dict[str, dict[str, Any]] = {
    "experts": {"model": SPARSE, "parallel": {"expert": 2}},
    "frozen": {"model": {"tie_embeddings": True}, **one_stage(freeze=["gen"])},
    "adapters": {"model": SPARSE, **one_stage(lora=ADAPTERS)},
}


def recipe_of(case: str) -> Recipe:
    changes = CASES[case]
    return recipe(**(changes if this_rank().size > 1 else {**changes, "parallel": {}}))


def train(folder: str, case: str) -> None:
    trainer(Path(folder), recipe_of(case), this_rank()).run()


def check_export(folder: Path, case: str, parsed: Recipe) -> None:
    """The last state of a run gives the checkpoint that the run ended with, bit for bit."""
    (state,) = saved_states(folder / "states")
    export_state(parsed, folder, state, folder / "exported", torch.float32)
    wanted, got = (CheckpointFolder.open(folder / name) for name in ("model", "exported"))
    assert wanted.tensors.keys() == got.tensors.keys()
    for name in wanted.tensors:
        assert torch.equal(wanted.tensor(name), got.tensor(name)), name
    assert wanted.config == got.config


@pytest.mark.parametrize("case", CASES)
def test_the_state_of_one_rank_is_exported(tmp_path: Path, case: str) -> None:
    train(str(tmp_path), case)
    check_export(tmp_path, case, recipe_of(case))


def read_on_ranks(one: str, many: str) -> list[str]:
    """Train on ranks, and read the state of one rank; names of what is not its own slice of it."""
    train(many, "experts")
    (state,) = saved_states(Path(one) / "states")
    training = trainer(Path(one) / "again", recipe_of("experts"), this_rank())
    like = {"model": training.model.state_dict()}
    read = load_state(state, like, ("model",), this_rank())[0]["model"]
    whole = StoredTensors(state / "model.safetensors")
    assert read.keys() == whole.shapes.keys()
    wrong = []
    for name, tensor in read.items():
        part = local(tensor)
        same = torch.equal(part, whole.read(name)[place(like["model"][name])])
        # No view of the whole tensor, which would stay in memory.
        alone = part.untyped_storage().nbytes() == part.numel() * 4
        if not (same and alone and tensor.shape == whole.shapes[name]):
            wrong.append(name)
    return wrong


def test_states_of_one_rank_and_of_two(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    train(str(one), "experts")
    wrong = run_ranks(read_on_ranks, str(one), str(many), ranks=2, seconds=240.0)
    assert wrong == [[], []]
    check_export(many, "experts", recipe(**CASES["experts"]))


def test_a_tensor_of_many_files_is_read_by_slices(tmp_path: Path) -> None:
    many = tmp_path / "many"
    run_ranks(train, str(many), "experts", ranks=2, seconds=240.0)
    (state,) = saved_states(many / "states")
    stored = StoredTensors(state / "model")
    name = "embed_tokens.weight"
    whole = stored.read(name)
    rows = len(whole)
    for first, stop in ((0, 3), (rows // 2 - 2, rows // 2 + 3), (rows - 1, rows), (4, 4)):
        part = stored.read(name, (slice(first, stop), slice(1, 5)))
        assert torch.equal(part, whole[first:stop, 1:5])


def test_a_state_of_another_model_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(str(tmp_path), "frozen")
    (state,) = saved_states(tmp_path / "states")
    other = recipe(model={"flow_head_width": 64}, **one_stage(freeze=["gen"]))
    with pytest.raises(CheckpointError, match="another model"):
        export_state(other, tmp_path, state, tmp_path / "x", torch.float32)
    original = export.expected_shapes

    def larger(config: Any) -> dict[str, torch.Size]:
        return {**original(config), "embed_tokens.weight": torch.Size((7, 7))}

    monkeypatch.setattr(export, "expected_shapes", larger)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape .* \[7, 7\]"):
        export_state(recipe_of("frozen"), tmp_path, state, tmp_path / "x", torch.float32)
    assert not (tmp_path / "x").exists()
