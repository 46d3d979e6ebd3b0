"""States written beside the training, on one rank and on two: whole, or without their name."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.checkpoint import CheckpointFolder, save_model
from neounify.distributed import states
from neounify.distributed.ranks import ONE, OtherRankError
from neounify.errors import CheckpointError, NeounifyError
from neounify.text.tokenizer import byte_tokenizer
from neounify.train import saving, state
from neounify.train.export import export_model
from neounify.train.recipe import recipe_from_table
from neounify.train.saving import StateWriter
from neounify.train.setup import build_setup, recipe_config
from neounify.train.state import load_state, newest_whole_state, saved_states
from neounify.train.weights import new_model
from support.parallel_runs import CASES, recipe, this_rank, trainer
from support.ranks import RankError, run_ranks

FACTS: dict[str, Any] = {"progress": {}, "position": None, "ema_updates": 0, "config": {}}
SECONDS = 240.0


def lines_of(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole state of a run's folder and what is said of others."""
    lines: list[str] = []
    return newest_whole_state(folder / "states", lines.append), lines


# --- one rank ---


def test_a_state_is_written_beside_what_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go = threading.Event(), threading.Event()
    original = saving.save_state

    def held_up(*arguments: Any) -> Path:
        began.set()
        assert go.wait(60)
        return original(*arguments)

    monkeypatch.setattr(saving, "save_state", held_up)
    weights = torch.arange(6.0).reshape(2, 3)
    writer = StateWriter(tmp_path, 2, ONE)
    tensors = {"model": {"w": weights}, "ema": {}, "optimizer": {"w.step": torch.tensor(3.0)}}
    writer.save(1, tensors, dict(FACTS))
    assert began.wait(60)
    weights.zero_()
    assert not saved_states(tmp_path)
    go.set()
    writer.save(2, tensors, dict(FACTS))  # waits for the first
    assert saved_states(tmp_path)[0].name == "step-00000001"
    writer.wait()
    first, second = (load_state(path)[0] for path in saved_states(tmp_path))
    assert first["model"]["w"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert not second["model"]["w"].any()
    assert float(first["optimizer"]["w.step"]) == 3


def test_a_save_that_fails_is_raised_once_and_leaves_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StateWriter(tmp_path, 2, ONE)
    tensors = {"model": {"w": torch.zeros(2)}, "ema": {}, "optimizer": {}}
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full_disk)
        writer.save(1, tensors, dict(FACTS))
        with pytest.raises(CheckpointError, match=r"could not be saved.*No space left"):
            writer.wait()
    assert not list(tmp_path.iterdir())
    writer.save(2, tensors, dict(FACTS))
    writer.wait()
    assert [path.name for path in saved_states(tmp_path)] == ["step-00000002"]


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_state_that_was_cut_off_is_passed_over_with_a_line(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path / "states", 2, ONE)
    tensors = {"model": {"w": torch.zeros(2)}, "ema": {}, "optimizer": {}}
    writer.save(1, tensors, dict(FACTS))
    writer.wait()
    for name in ("step-00000002", "step-00000001"):
        (tmp_path / "states" / f".{name}.0123456789abcdef.saving").mkdir()
    newest, lines = lines_of(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000001"
    assert lines == ["passed over: the state step-00000002 was cut off while it was written"]


# --- two ranks ---


def killed_while_saving(folder: str, rank: int) -> None:
    """Train with a state every step; a rank dies while the second one is written."""
    original = states.dcp.save

    def save(tensors: Any, **arguments: Any) -> Any:
        # Written beside the training, which may be ahead: the state before counts, not the step.
        if saved_states(training.states) and this_rank().rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(tensors, **arguments)

    training = trainer(Path(folder), recipe(defaults={"save_every": 1}), this_rank())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states.dcp, "save", save)
        training.run()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_it_saves_leaves_the_state_before(tmp_path: Path, rank: int) -> None:
    with pytest.raises(RankError):
        run_ranks(killed_while_saving, str(tmp_path), rank, ranks=2, seconds=SECONDS)
    newest, lines = lines_of(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000001"
    # The first rank, if it lives long enough, removes what was cut off.
    cut_off = "passed over: the state step-00000002 was cut off while it was written"
    assert lines == [cut_off] or (rank and not lines)
    training = trainer(tmp_path, recipe(), ONE)
    training.resume(newest)
    training.run()
    assert training.progress.step == 3
    assert lines_of(tmp_path)[1] == []


def said(work: Any) -> str:
    """The message of an error, its type for the ranks that another one speaks for."""
    try:
        work()
    except OtherRankError:
        return "other"
    except NeounifyError as error:
        return str(error)
    return ""


def failures(folder: str) -> dict[str, Any]:
    """What each rank says of a disk that is full for rank 1, and of states only one can read."""
    at = Path(folder)
    results: dict[str, Any] = {}
    training = trainer(at, recipe(defaults={"save_every": 1}), this_rank())
    training.run(stop_after=1)
    second = this_rank().rank == 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if second:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    results["full"] = said(lambda: training.run())
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    results["states"] = [path.name for path in saved_states(at / "states")]
    saved = at / "states" / "step-00000001"

    def again(**changes: Any) -> str:
        return said(lambda: trainer(at / "other", recipe(**changes), this_rank()).resume(saved))

    original = states._without_values

    def out_of_memory(*arguments: Any) -> Any:
        if second:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "_without_values", out_of_memory)
        results["memory"] = again()
    results["model"] = again(model={"flow_head_width": 64})
    this_rank().wait()
    if second:
        next((saved / "model").iterdir()).unlink()
    this_rank().wait()
    results["pieces"] = again()
    return results


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("failures"))
    return run_ranks(failures, folder, ranks=2, seconds=SECONDS)


def test_a_disk_that_is_full_for_one_rank_is_said_by_the_first(
    failed: list[dict[str, Any]],
) -> None:
    assert "step-00000002 could not be saved: rank 1: " in failed[0]["full"]
    assert "File too large" in failed[0]["full"]
    assert failed[1]["full"] == "other"
    assert failed[0]["states"] == failed[1]["states"] == ["step-00000001"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("memory", "cannot be read: rank 1: .*can't allocate memory"),
        ("model", r"it is of another model: .* has shape \[32\], here \[64\]"),
        ("pieces", r"lacks model/shard-0000\d-"),
    ],
)
def test_a_state_that_a_rank_cannot_read_is_an_error_of_all(
    failed: list[dict[str, Any]], case: str, message: str
) -> None:
    assert re.search(message, failed[0][case]), failed[0][case]
    assert failed[1][case] == "other"


def exported(folder: str, dtype: str) -> str:
    """Export a checkpoint as it was read, over the ranks, and over a file; what is said of that."""
    at = Path(folder)
    table = {"name": "r", "parallel": {}, "model": {"checkpoint": str(at / "published")}}
    stages = [{"name": "a", "steps": 1, "packs_per_step": 4, "data": [{"kind": "scenes"}]}]
    parsed = recipe_from_table({**table, "stages": stages})
    setup = build_setup(parsed, torch.device("cpu"), at, this_rank())
    export_model(setup, at / "exported", getattr(torch, dtype))
    return said(lambda: export_model(setup, at / "file"))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_read_by_ranks_is_exported_with_its_bytes(
    tmp_path: Path, ranks: int, dtype: str
) -> None:
    model = new_model(recipe_config(recipe(**CASES["sparse"])), 0).to(getattr(torch, dtype))
    save_model(model, tmp_path / "published", tokenizer=byte_tokenizer(), max_shard_bytes=100_000)
    (tmp_path / "file").touch()
    results = run_ranks(exported, str(tmp_path), dtype, ranks=ranks, seconds=SECONDS)
    assert "file is a file" in results[0]
    assert results[1:] == ["other"] * (ranks - 1)
    before, after = (CheckpointFolder.open(tmp_path / n) for n in ("published", "exported"))
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert before.tensor(name).dtype == after.tensor(name).dtype
        assert torch.equal(bytes_of(before.tensor(name)), bytes_of(after.tensor(name))), name


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
