"""The recipes of the repository: all can be read, the miniature one runs, frozen is frozen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from neounify.checkpoint.names import stream_of
from neounify.pipeline import load
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.recipe import Recipe, TokenizerRecipe, read_recipe
from neounify.train.setup import Start, starting_model

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.toml"))
STAGES = ["understanding", "generation-1", "generation-2", "generation-3", "unified", "sft"]
TRAINED = [{"und", "shared"}, {"gen"}, {"gen"}, {"gen"}, {"und", "gen", "shared"}]
TRAINED.append(TRAINED[-1])
TINY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "flow_head_width": 32,
}


def cut(recipe: Recipe) -> Recipe:
    """The same stages with two steps each, for a tiny model."""
    model = replace(recipe.model, changes=TINY, tokenizer=TokenizerRecipe(samples=50))
    stages = tuple(replace(s, steps=2, budget=600) for s in recipe.stages)
    return replace(recipe, model=model, stages=stages, workers=0)


def train(recipe: Recipe, start: Start, folder: Path) -> None:
    log = Log(folder, Console(quiet=True), tensorboard=False)
    Trainer(recipe, start, folder, log).run()


def weights(start: Start) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in start.model.named_parameters()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_can_be_read(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.stages
    for item in (item for stage in recipe.stages for item in stage.data):
        assert (item.kind == "scenes") == (item.path is None)


@pytest.mark.parametrize("name", ["published", "miniature"])
def test_the_published_stages_are_all_there(name: str) -> None:
    recipe = read_recipe(FOLDER / f"{name}.toml")
    assert [stage.name for stage in recipe.stages] == STAGES
    for stage, trained in zip(recipe.stages, TRAINED, strict=True):
        assert {"und", "gen", "shared"} - set(stage.freeze) == trained
        assert (stage.objective.text_weight, stage.objective.image_weight) == (0.1, 1.0)
        assert (stage.dropout.text, stage.dropout.all) == (0.1, 0.1)


def test_the_miniature_runs_all_its_stages(tmp_path: Path) -> None:
    recipe = cut(read_recipe(FOLDER / "miniature.toml"))
    train(recipe, starting_model(recipe, torch.device("cpu"), tmp_path), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["stage_step"]) for line in lines] == [(s, 2) for s in STAGES]
    assert load(tmp_path / "model").model.config.hidden_size == TINY["hidden_size"]


def test_each_stage_moves_what_it_trains_and_not_a_bit_else(tmp_path: Path) -> None:
    recipe = cut(read_recipe(FOLDER / "miniature.toml"))
    start = starting_model(recipe, torch.device("cpu"), tmp_path)
    for stage, trained in zip(recipe.stages, TRAINED, strict=True):
        before = weights(start)
        train(replace(recipe, stages=(stage,)), start, tmp_path / stage.name)
        after = weights(start)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if stream_of(name) in trained}, stage.name
