"""The memory plan against the table of the design for stages that train everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neounify.cli.app import app
from neounify.config.presets import PRESETS
from neounify.train.memory import GB, stage_memory
from neounify.train.recipe import StageRecipe
from neounify.train.supervised import SupervisedConfig


def stage() -> StageRecipe:
    return StageRecipe(
        name="unified",
        steps=1,
        method=SupervisedConfig(tokens_per_pack=28_672),
        precision="bfloat16",
        checkpoint_activations=True,
    )


@pytest.mark.parametrize(
    ("preset", "states", "unit", "root", "inputs", "layer"),
    [("8b", 43.9, 3.9, 2.7, 2 * 9.9, 5.3), ("a3b", 96.8, 7.9, 1.3, 2 * 5.6, 5.7)],
)
def test_the_table_of_unified_training(
    preset: str, states: float, unit: float, root: float, inputs: float, layer: float
) -> None:
    """On 8 devices; the table's inputs are of a residual in bfloat16, which is float32 here."""
    memory = stage_memory(PRESETS[preset], stage())
    assert memory.states / 8 / GB == pytest.approx(states, abs=0.2)
    assert memory.unit / GB == pytest.approx(unit, abs=0.1)
    assert memory.root / GB == pytest.approx(root, abs=0.1)
    assert memory.inputs / GB == pytest.approx(inputs, abs=0.1)
    assert memory.layer / GB == pytest.approx(layer, abs=0.1)


def test_the_least_degree_that_fits() -> None:
    memory = stage_memory(PRESETS["8b"], stage())
    least = memory.fitting(79 * GB)
    assert least is not None
    assert memory.on(least) <= 75 * GB < memory.on(least - 1)
    assert memory.fitting(20 * GB) is None


def test_the_published_recipe_fits_64_devices_and_not_8() -> None:
    recipe = str(Path(__file__).parents[2] / "recipes" / "published.toml")
    for gpus, code in ((64, 0), (8, 1)):
        arguments = ["plan", "--train", recipe, "--gpus", str(gpus), "--preset", "8b", "--json"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code, done.output
        fits = {stage["stage"]: stage["fits"] for stage in json.loads(done.stdout)["stages"]}
        assert fits["generation-3"]
        assert fits["unified"] == fits["sft"] == (code == 0)


RECIPE = """
name = "r"
[model]
preset = "scenes"
[parallel]
replicate = 2
[[stages]]
name = "all"
steps = 1
packs_per_step = 8
[[stages]]
name = "gen"
steps = 1
packs_per_step = 8
freeze = ["und", "shared"]
"""


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    arguments = ["plan", "--train", str(path), "--gpus", "4", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["replicate"], document["shard"]) == (2, 2)
    whole, gen = document["stages"]
    assert whole["frozen"] == 0
    assert gen["trained"] + gen["frozen"] == whole["trained"]
    large = CliRunner().invoke(app, [*arguments[:-1], "--preset", "8b"])
    assert large.exit_code == 1
    assert "shard must be at least" in large.stdout
    wrong = CliRunner().invoke(app, ["plan", "--train", str(path), "--gpus", "3"])
    assert wrong.exit_code == 1
    assert "3 ranks cannot be divided into 2 copies" in wrong.stderr
