"""The memory plan against the table of the design for stages that train everything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neounify.cli.app import app
from neounify.config.presets import PRESETS
from neounify.data.configs import read_data
from neounify.distributed.mesh import MeshShape
from neounify.lora.layers import LoraConfig
from neounify.train.memory import GB, stage_memory
from neounify.train.recipe import StageRecipe
from neounify.train.supervised import SupervisedConfig


def stage(part: str = "unified") -> StageRecipe:
    """A stage as the design counts it: frozen weights and the residual stream in bfloat16."""
    task = {"task": "vqa"} if part == "understanding" else {}
    return StageRecipe(
        name=part,
        steps=1,
        method=SupervisedConfig(tokens_per_pack=28_672),
        precision="bfloat16",
        residual="bfloat16",
        frozen_weights="bfloat16",
        checkpoint_activations=True,
        freeze={"understanding": ("gen",), "generation": ("und", "shared"), "unified": ()}[part],
        data=(read_data({"kind": "shards", "path": "data", **task}),),
    )


@pytest.mark.parametrize(
    ("preset", "part", "expert", "trained", "states", "unit", "root", "inputs", "layer", "total"),
    [
        ("8b", "understanding", 1, 9.4, 23.4, 1.9, 2.5, 9.9, 5.3, (43, 31, 23)),
        ("8b", "generation", 1, 8.2, 22.8, 2.7, 2.7, 9.9, 5.3, (43, 32, 23)),
        ("8b", "unified", 1, 17.6, 43.9, 3.9, 2.7, 9.9, 5.3, (66, 44, 27)),
        ("a3b", "understanding", 1, 30.5, 76.4, 6.2, 1.3, 5.6, 5.7, (95, 57, 28)),
        ("a3b", "generation", 1, 8.2, 28.1, 4.2, 1.3, 5.6, 5.7, (45, 31, 20)),
        ("a3b", "unified", 1, 38.7, 96.8, 7.9, 1.3, 5.6, 5.7, (117, 69, 33)),
        ("a3b", "unified", 8, 38.7, 96.8, 1.3, 1.3, 5.6, 5.7, (111, 62, 26)),
    ],
)
def test_the_table_of_the_design(
    preset: str,
    part: str,
    expert: int,
    trained: float,
    states: float,
    unit: float,
    root: float,
    inputs: float,
    layer: float,
    total: tuple[int, int, int],
) -> None:
    """States on 8 devices, sums on 8, 16 and 64."""
    memory = stage_memory(PRESETS[preset], stage(part), MeshShape(expert=expert))
    assert memory.trained / GB == pytest.approx(trained, abs=0.06)
    assert memory.states / 8 / GB == pytest.approx(states, abs=0.1)
    assert memory.unit / GB == pytest.approx(unit, abs=0.06)
    assert memory.root / GB == pytest.approx(root, abs=0.06)
    assert memory.inputs / GB == pytest.approx(inputs, abs=0.06)
    assert memory.layer / GB == pytest.approx(layer, abs=0.06)
    assert [round(memory.on(devices) / GB) for devices in (8, 16, 64)] == list(total)


def test_ranks_that_share_a_pack_keep_a_part_of_its_rows(tmp_path: Path) -> None:
    one = stage_memory(PRESETS["8b"], stage())
    four = stage_memory(PRESETS["8b"], stage(), MeshShape(sequence=4))
    assert (four.inputs, four.layer) == (one.inputs / 4, one.layer / 4)
    assert (four.states, four.unit, four.root) == (one.states, one.unit, one.root)
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.replace("replicate", "sequence"))
    done = CliRunner().invoke(app, ["plan", "--train", str(path), "--gpus", "8", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["sequence"], document["shard"], document["replicate"]) == (2, 4, 1)


def test_adapters_are_whole_and_the_weights_beside_them_frozen() -> None:
    lora = LoraConfig(rank=16, streams=("gen",), modules=("attention",))
    plain = replace(stage(), frozen_weights="float32")
    memory, full = (stage_memory(PRESETS["8b"], x) for x in (replace(plain, lora=lora), plain))
    config = PRESETS["8b"]
    q, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    widths = 2 * (q + config.hidden_size) + 2 * (kv + config.hidden_size)
    assert memory.trained == 16 * widths * config.num_layers
    assert memory.frozen == full.trained
    assert memory.adapters == 20 * memory.trained
    assert memory.on(8) == memory.states / 8 + memory.rest
    assert memory.states == 4 * memory.frozen
    assert memory.rest > memory.unit + memory.root + memory.inputs + memory.layer
    assert memory.on(8) < full.on(8)


def test_float32_takes_more() -> None:
    """Of the residual stream twice the inputs, of frozen weights twice their bytes."""
    half = stage("generation")
    full = replace(half, residual="float32", frozen_weights="float32")
    one, other = (stage_memory(PRESETS["8b"], x) for x in (half, full))
    assert other.inputs == 2 * one.inputs
    assert other.states - one.states == 2 * one.frozen


def test_the_least_degree_that_fits() -> None:
    memory = stage_memory(PRESETS["8b"], stage())
    least = memory.fitting(79 * GB)
    assert least is not None
    assert memory.on(least) <= 75 * GB < memory.on(least - 1)
    assert memory.fitting(20 * GB) is None


@pytest.mark.parametrize(
    ("recipe", "preset", "gpus", "expert"),
    [
        ("published", "8b", 8, 1),
        ("published", "8b", 64, 1),
        ("published_a3b", "a3b", 64, 8),
        ("published_a3b", "a3b", 8, 8),
    ],
)
def test_published_recipes_fit(recipe: str, preset: str, gpus: int, expert: int) -> None:
    path = str(Path(__file__).parents[2] / "recipes" / f"{recipe}.toml")
    arguments = ["plan", "--train", path, "--gpus", str(gpus), "--preset", preset, "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["expert"], document["shard"]) == (expert, gpus // expert)
    assert all(one["fits"] for one in document["stages"])


def test_a_recipe_that_does_not_fit(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "published_a3b.toml").read_text()
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace('ema_memory = "host"', 'ema_memory = "device"'))
    arguments = ["plan", "--train", str(path), "--gpus", "8", "--preset", "a3b"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "replicate 1 × shard 1 × expert 8" in done.stdout
    assert "does not fit: shard must be at least 2" in done.stdout


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
