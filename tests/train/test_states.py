"""States on disk: damage is found before training resumes from it, and costs one state only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.distributed.ranks import ONE, Ranks
from neounify.errors import CheckpointError
from neounify.train.state import (
    check_state,
    flatten_optimizer,
    load_state,
    newest_of_launch,
    newest_whole_state,
    prune_states,
    save_state,
    saved_states,
    unflatten_optimizer,
)

FACTS: dict[str, Any] = {"progress": {}, "position": None, "ema_updates": 1, "config": {}}


def save(folder: Path, step: int, ranks: Ranks = ONE) -> Path:
    weight = {"w": torch.full((50, 50), float(step))}
    tensors = {"model": weight, "ema": weight, "optimizer": weight}
    return save_state(folder, step, tensors, FACTS, ranks)


@pytest.fixture
def states(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def spoil_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[:8] = b"\xff" * 8
    file.write_bytes(data)


def lose_a_fact(file: Path) -> None:
    facts = json.loads(file.read_text())
    del facts["position"]
    file.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", cut),
        ("optimizer.safetensors", cut),
        ("ema.safetensors", flip),
        ("model.safetensors", spoil_header),
        ("ema.safetensors", Path.unlink),
        ("state.json", cut),
        ("state.json", Path.unlink),
        ("state.json", lose_a_fact),
    ],
)
def test_a_damaged_newest_state_is_passed_over(states: Path, file: str, damage: object) -> None:
    damage(states / "step-00000003" / file)  # type: ignore[operator]
    said: list[str] = []
    newest = newest_whole_state(states, said.append)
    assert newest == states / "step-00000002"
    assert len(said) == 1
    assert "step-00000003" in said[0]
    assert file in said[0]
    tensors, _ = load_state(newest)
    assert tensors["model"]["w"][0, 0] == 2


def test_whole_states_are_never_passed_over(states: Path) -> None:
    assert newest_whole_state(states, pytest.fail) == states / "step-00000003"


def test_nothing_to_resume_and_nothing_whole(states: Path, tmp_path: Path) -> None:
    assert newest_whole_state(tmp_path / "none", pytest.fail) is None
    for path in saved_states(states):
        cut(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="all 3 states") as raised:
        newest_whole_state(states, pytest.fail)
    assert all(f"step-0000000{n}" in str(raised.value) for n in (1, 2, 3))


def test_states_without_hashes_are_still_read(states: Path) -> None:
    file = states / "step-00000003" / "state.json"
    facts = json.loads(file.read_text())
    del facts["files"]
    file.write_text(json.dumps(facts))
    check_state(file.parent)
    cut(file.parent / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        check_state(file.parent)


def test_damaged_states_that_lie_ahead_do_not_count_as_kept(states: Path) -> None:
    cut(states / "step-00000003" / "model.safetensors")
    prune_states(states, 1, 2)
    assert [p.name for p in saved_states(states)] == ["step-00000002", "step-00000003"]
    save(states, 3)
    prune_states(states, 1, 3)
    assert [p.name for p in saved_states(states)] == ["step-00000003"]
    check_state(states / "step-00000003")


def test_the_newest_state_is_the_one_saved_last(states: Path) -> None:
    """A run that resumed from step 1 saves step 2 after step 3, which it has left behind."""
    save(states, 2)
    assert newest_whole_state(states, pytest.fail) == states / "step-00000002"
    prune_states(states, 1, 2)
    assert [p.name for p in saved_states(states)] == ["step-00000002", "step-00000003"]
    save(states, 3)
    prune_states(states, 2, 3)
    assert newest_whole_state(states, pytest.fail) == states / "step-00000003"


def test_states_of_earlier_versions_are_older_than_those_of_this_one(states: Path) -> None:
    file = states / "step-00000003" / "state.json"
    facts = json.loads(file.read_text())
    del facts["saved"]
    file.write_text(json.dumps(facts))
    assert newest_whole_state(states, pytest.fail) == states / "step-00000002"


def test_the_newest_state_of_a_launch(states: Path) -> None:
    save(states, 4, replace(ONE, launch="this"))
    save(states, 2, replace(ONE, launch="this"))
    save(states, 3, replace(ONE, launch="another"))
    assert newest_of_launch(states, "this", pytest.fail) == states / "step-00000002"
    assert newest_of_launch(states, "", pytest.fail) is None
    assert newest_of_launch(states, "a third", pytest.fail) is None
    said: list[str] = []
    cut(states / "step-00000002" / "model.safetensors")
    assert newest_of_launch(states, "this", said.append) == states / "step-00000004"
    cut(states / "step-00000004" / "model.safetensors")
    assert newest_of_launch(states, "this", said.append) is None
    assert ["step-00000002" in line for line in said] == [True, True, False]


def test_a_kill_while_states_are_pruned(states: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is being removed has lost its name before its first file goes."""

    def remove_some(path: Path, **_: object) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", remove_some)
    with pytest.raises(KeyboardInterrupt):
        prune_states(states, 1, 3)
    assert all((state / "state.json").is_file() for state in saved_states(states))


def test_states_of_earlier_versions_get_the_names_of_now(tmp_path: Path) -> None:
    """Streams had no halves: layers.0.und.q_proj is layers.0.und.qkv.q_proj now."""
    names = ["layers.0.und.q_proj.weight", "layers.1.gen.mlp.up_proj.weight", "und_norm.weight"]
    tensors = {name: torch.ones(2) for name in names}
    facts = {**FACTS, "optimizer_parameters": [names[:1], names[1:]]}
    optimizer = {"0.0.exp_avg": torch.ones(2)}
    files = {"model": tensors, "ema": tensors, "optimizer": optimizer}
    loaded, facts = load_state(save_state(tmp_path, 1, files, facts))
    now = [
        "layers.0.und.qkv.q_proj.weight",
        "layers.1.gen.out.mlp.up_proj.weight",
        "und_norm.weight",
    ]
    assert sorted(loaded["model"]) == sorted(loaded["ema"]) == sorted(now)
    assert loaded["optimizer"].keys() == optimizer.keys()
    assert facts["optimizer_parameters"] == [now[:1], now[1:]]


def test_numbered_states_of_earlier_versions_get_their_names() -> None:
    names = [["a.weight", "b.weight"], ["c.weight"]]
    one = torch.ones(2)
    numbered = {"0.1.exp_avg": one, "1.0.momentum_buffer": one}
    named = {"b.weight": {"exp_avg": one}, "c.weight": {"momentum_buffer": one}}
    assert unflatten_optimizer(numbered, names) == named
    assert unflatten_optimizer(flatten_optimizer(named), names) == named
    with pytest.raises(CheckpointError, match="another optimizer"):
        unflatten_optimizer({"1.1.exp_avg": one}, names)


def test_files_outside_of_a_state_are_refused(states: Path) -> None:
    file = states / "step-00000003" / "state.json"
    facts = json.loads(file.read_text())
    facts["files"]["../step-00000002/model.safetensors"] = None
    file.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="damaged: its file"):
        check_state(file.parent)
