"""Runs resumed with changed settings, diverged or killed: an error, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.errors import CheckpointError, ConfigError
from neounify.train.loop import TrainingStopped
from neounify.train.recipe import read_recipe
from neounify.train.state import save_state, saved_states
from train.test_trainer import recipe, trainer


def stage(**fields: Any) -> dict[str, Any]:
    return {"name": "a", "steps": 4, **fields}


def started(folder: Path, **fields: Any) -> Path:
    """The state after two steps of a stage."""
    trainer(folder, recipe(stages=[stage(**fields)])).run(stop_after=2)
    return saved_states(folder / "states")[-1]


def forget_names(state: Path) -> None:
    """Make a state one of an earlier version, which held no names of parameters."""
    facts = json.loads((state / "state.json").read_text())
    del facts["optimizer_parameters"]
    (state / "state.json").write_text(json.dumps(facts))


ADAMW, MUON = {"name": "adamw"}, {"name": "muon"}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"freeze": ["gen"]}, "other parameters.*freeze"),
        ({"freeze": ["und"]}, {"freeze": ["gen"]}, "other parameters.*freeze"),
        ({"optimizer": ADAMW}, {"optimizer": MUON}, "another optimizer"),
        ({"optimizer": MUON}, {"optimizer": ADAMW}, "another optimizer"),
        ({"lora": {"rank": 2}}, {"lora": {"rank": 3}}, r"lora_A.*more\)"),
    ],
)
def test_other_parameters_or_optimizers_do_not_take_a_state_over(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    state = started(tmp_path, **before)
    resumed = trainer(tmp_path, recipe(stages=[stage(**after)]))

    def go_on() -> None:
        resumed.resume(state)
        resumed.run()

    with pytest.raises(CheckpointError, match=said) as raised:
        go_on()
    assert len(str(raised.value)) < 700
    assert saved_states(tmp_path / "states")[-1] == state


@pytest.mark.parametrize("after", [{"freeze": ["gen"]}, {"optimizer": ADAMW}])
def test_states_without_names_are_taken_over_only_where_they_fit(
    tmp_path: Path, after: dict[str, Any]
) -> None:
    state = started(tmp_path)
    forget_names(state)
    same = trainer(tmp_path, recipe(stages=[stage()]))
    same.resume(state)
    same.run(stop_after=3)
    other = trainer(tmp_path, recipe(stages=[stage(**after)]))
    other.resume(state)
    with pytest.raises(CheckpointError, match="state"):
        other.run()


def test_settings_that_reorder_parameters_keep_each_its_own_moments(tmp_path: Path) -> None:
    state = started(tmp_path, optimizer=ADAMW)
    changed = {"name": "adamw", "lr_scale": {"und": 0.5}, "weight_decay": 0.1}
    resumed = trainer(tmp_path, recipe(stages=[stage(optimizer=changed)]))
    resumed.resume(state)
    seen: dict[str, torch.Tensor] = {}

    def look(running: Any, *rest: Any) -> None:
        (optimizers,) = running.optimizers
        member = optimizers.members[0]
        names = optimizers.names()[0]
        parameters = [p for group in member.param_groups for p in group["params"]]
        seen.update({n: member.state[p]["exp_avg"] for n, p in zip(names, parameters, strict=True)})
        raise KeyboardInterrupt

    resumed._step = look  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        resumed.run()
    before = trainer(tmp_path, recipe(stages=[stage(optimizer=ADAMW)]))
    before.resume(state)
    expected, seen = dict(seen), {}
    before._step = look  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        before.run()
    assert expected.keys() == seen.keys()
    assert all(torch.equal(expected[name], seen[name]) for name in seen)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    state = started(tmp_path)
    resumed = trainer(tmp_path, recipe(stages=[stage()]))
    resumed.resume(state)
    with torch.no_grad():
        next(iter(resumed.model.parameters())).fill_(float("inf"))
    with pytest.raises(TrainingStopped, match=r"NaN or infinite after step 4.*learning_rate"):
        resumed.run()
    assert saved_states(tmp_path / "states") == [state]
    assert not (tmp_path / "model").exists()


def test_what_a_kill_left_while_saving_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000001.0badcafe.saving"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    weight = {"w": torch.ones(2)}
    tensors = {"model": weight, "ema": weight, "optimizer": weight}
    save_state(tmp_path, 2, tensors, {"progress": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_tokenizer_is_kept_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_: Any, folder: Path) -> None:
        (folder / "vocab.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("neounify.text.tokenizer.Tokenizer.save", half)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path)
    trainer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer"]


def test_freezing_beside_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"freeze: a stage with lora .*lora\.streams"):
        recipe(stages=[stage(lora={"rank": 2}, freeze=["und"])])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", {"tokens_per_pack": 2**60}),
        ("packs_per_step", 2**60),
        ("method", {"noise_draws": 2**60}),
        ("lora", {"rank": 2**60}),
    ],
)
def test_counts_that_would_fill_the_memory_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{field}.*must be within"):
        recipe(stages=[stage(**{field: value})])


@pytest.mark.parametrize("name", [".", "a\0b", "n" * 5000, "line\nbreak"])
def test_names_that_no_folder_can_have_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name the folder") as raised:
        recipe(name=name)
    assert len(str(raised.value)) < 300


RECIPE = (
    '\ufeffname = "x"\r\n[model]\r\npreset = "scenes"\r\n[[stages]]\r\nname = "a"\r\nsteps = 1\r\n'
)


def test_recipes_of_any_editor_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(RECIPE.encode())
    assert read_recipe(tmp_path / "r.toml").stages[0].steps == 1


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "[a" + ".a" * 20_000 + "]\n"])
def test_recipes_nested_without_end_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_recipe(tmp_path / "r.toml")


def test_a_recipe_without_end_is_not_read_whole() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        read_recipe(Path("/dev/zero"))


def test_no_state_is_saved_while_steps_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, recipe(stages=[stage(steps=9, save_every=1)]))
    step = run._step

    def spoilt(*args: Any) -> Any:
        rate, norm, taken = step(*args)
        return rate, norm, taken and run.progress.step < 3

    monkeypatch.setattr(run, "_step", spoilt)
    said: list[str] = []
    monkeypatch.setattr(run.log, "warn", said.append)
    limit = run.recipe.stages[0].max_nonfinite
    assert limit > 6
    run.run()
    names = [path.name for path in saved_states(tmp_path / "states")]
    assert names == ["step-00000003", "step-00000009"]
    assert any("last 6 steps were not finite" in line for line in said)
