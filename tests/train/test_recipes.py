"""The recipes of the repository: all can be read, the miniature one runs, frozen is frozen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from neounify.bundled import bundled_model
from neounify.checkpoint.names import stream_of
from neounify.config.presets import PIXELUMM_8B
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoder
from neounify.data.sample import Sample, SampleClip, SampleText, Turn
from neounify.data.shards import ShardData
from neounify.data.sources import JsonlData
from neounify.errors import ConfigError
from neounify.motion.world.samples import MotionData
from neounify.pipeline import load
from neounify.scenes.world.samples import SceneData
from neounify.text import byte_tokenizer
from neounify.text.forms import TEMPLATES
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.recipe import (
    Recipe,
    StageRecipe,
    TokenizerRecipe,
    read_recipe,
    recipe_from_table,
)
from neounify.train.setup import TrainSetup, build_setup
from neounify.train.supervised import SupervisedConfig
from support.models import TINY_CHANGES

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.toml"))
STAGES = ["understanding", "generation-1", "generation-2", "generation-3", "unified", "sft"]
TRAINED = [{"und", "shared"}, {"gen"}, {"gen"}, {"gen"}, {"und", "gen", "shared"}]
TRAINED.append(TRAINED[-1])


def supervised(stage: StageRecipe) -> SupervisedConfig:
    assert isinstance(stage.method, SupervisedConfig)
    return stage.method


def cut(recipe: Recipe) -> Recipe:
    """The same stages with two steps each, for a tiny model."""
    model = replace(recipe.model, changes=TINY_CHANGES, tokenizer=TokenizerRecipe(samples=50))
    stages = tuple(
        replace(s, steps=2, method=replace(supervised(s), tokens_per_pack=600))
        for s in recipe.stages
    )
    return replace(recipe, model=model, stages=stages, workers=0)


def train(recipe: Recipe, setup: TrainSetup, folder: Path) -> None:
    log = Log(folder, Console(quiet=True), tensorboard=False)
    Trainer(recipe, setup, folder, log).run()


def weights(setup: TrainSetup) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in setup.model.named_parameters()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_can_be_read(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.stages
    for item in (item for stage in recipe.stages for item in stage.data):
        assert isinstance(item, SceneData | MotionData | JsonlData | ShardData)


@pytest.mark.parametrize("name", ["published", "miniature"])
def test_the_published_stages_are_all_there(name: str) -> None:
    recipe = read_recipe(FOLDER / f"{name}.toml")
    assert [stage.name for stage in recipe.stages] == STAGES
    for stage, trained in zip(recipe.stages, TRAINED, strict=True):
        assert {"und", "gen", "shared"} - set(stage.freeze) == trained
        method = supervised(stage)
        assert (method.loss.text_weight, method.loss.image_weight) == (0.1, 1.0)
        dropout = method.guidance_dropout
        assert (dropout.text, dropout.all) == (0.1, 0.1)


def test_the_objective_of_pixelumm() -> None:
    (stage,) = read_recipe(FOLDER / "pixelumm.toml").stages
    method, loss = supervised(stage), supervised(stage).loss
    assert (loss.text_weight, loss.image_weight, loss.image_mean) == (1, 1, "images")
    assert (loss.t_mean, loss.t_std) == (0, 1)
    assert dict(loss.side_shifts) == {256: 1, 640: 2, 960: 3}
    assert (method.guidance_dropout.text, method.guidance_dropout.all) == (0.1, 0)
    assert (stage.optimizer.learning_rate, stage.optimizer.betas) == (1e-5, (0.9, 0.95))
    assert stage.optimizer.weight_decay == 0
    assert stage.clip == 1


def test_the_data_of_pixelumm() -> None:
    """Images, clips and questions; a clip of the largest frames with any caption fits in a pack."""
    (stage,) = read_recipe(FOLDER / "pixelumm.toml").stages
    images, clips, questions = stage.data
    for source in (images, clips, questions):
        assert isinstance(source, ShardData)
    assert isinstance(clips, ShardData)
    assert (images.weight, clips.weight, questions.weight) == (0.4, 0.2, 0.4)
    assert clips.clips.target_frames == PIXELUMM_8B.sampling.video.frames == 96
    assert clips.clips.target_fps is None
    assert PIXELUMM_8B.sampling.video.fps == 24
    method = supervised(stage)
    encoder = Encoder(
        config=PIXELUMM_8B,
        tokenizer=byte_tokenizer(required=TEMPLATES[PIXELUMM_8B.template].tokens),
        dropout=GuidanceDropout(text=0, all=0),
        target_pixels=method.target_pixels,
        max_tokens=method.tokens_per_pack,
    )
    caption = SampleText("x" * 4096)
    for side, tokens in ((448, 18_816), (480, 21_600)):
        frames = np.zeros((96, side, side, 3), dtype=np.uint8)
        turns = Turn("user", (caption,)), Turn("assistant", (SampleClip(frames, "target", 24.0),))
        encoded = encoder(Sample("t2v", turns, "a clip"), np.random.default_rng(0))
        assert encoded.document.spans[-1].length == tokens
        assert 4096 < encoded.document.und_length() < 4200


def test_the_miniature_runs_all_its_stages(tmp_path: Path) -> None:
    recipe = cut(read_recipe(FOLDER / "miniature.toml"))
    train(recipe, build_setup(recipe, torch.device("cpu"), tmp_path), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["stage_step"]) for line in lines] == [(s, 2) for s in STAGES]
    assert load(tmp_path / "model").model.config.hidden_size == TINY_CHANGES["hidden_size"]


def test_each_stage_moves_what_it_trains_and_not_a_bit_else(tmp_path: Path) -> None:
    recipe = cut(read_recipe(FOLDER / "miniature.toml"))
    setup = build_setup(recipe, torch.device("cpu"), tmp_path)
    for stage, trained in zip(recipe.stages, TRAINED, strict=True):
        before = weights(setup)
        train(replace(recipe, stages=(stage,)), setup, tmp_path / stage.name)
        after = weights(setup)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if stream_of(name) in trained}, stage.name


OLD: dict[str, Any] = {
    "budget": 700,
    "most_nonfinite": 4,
    "noise_draws": 2,
    "dropout": {"text": 0.2},
    "target_pixels": [1024, 4096],
    "input_pixels": [1024, 2048],
}
NEW: dict[str, Any] = {
    "max_nonfinite": 4,
    "method": {
        "tokens_per_pack": 700,
        "noise_draws": 2,
        "guidance_dropout": {"text": 0.2},
        "loss": {"t_std": 0.5},
        "target_pixels": [1024, 4096],
        "input_pixels": [1024, 2048],
    },
}


def test_field_names_of_earlier_versions_are_deprecated() -> None:
    table: dict[str, Any] = {"name": "x", "model": {"preset": "scenes"}}
    stage: dict[str, Any] = {"name": "a", "steps": 1, "objective": {"text_weight": 0.5}}
    stage["target_buckets"] = [[32, 64]]
    old = {**table, "defaults": {**OLD, "objective": {"t_std": 0.5}}, "stages": [stage]}
    method: dict[str, Any] = {"kind": "supervised", "loss": {"text_weight": 0.5}}
    method["target_buckets"] = [[32, 64]]
    new = {**table, "defaults": NEW, "stages": [{"name": "a", "steps": 1, "method": method}]}
    with pytest.warns(DeprecationWarning, match="is deprecated, use") as warned:
        read = recipe_from_table(old)
    assert read == recipe_from_table(new)
    assert supervised(read.stages[0]).loss.t_std == 0.5
    assert supervised(read.stages[0]).tokens_per_pack == 700
    said = [str(warning.message) for warning in warned]
    assert "defaults: budget is deprecated, use method.tokens_per_pack" in said
    assert "stages.0: objective is deprecated, use method.loss" in said
    assert len(said) == 9


def test_an_old_name_beside_its_new_one_is_refused() -> None:
    table: dict[str, Any] = {"name": "x", "model": {"preset": "scenes"}}
    stage = {"name": "a", "steps": 1, "budget": 5, "tokens_per_pack": 6}
    with pytest.raises(ConfigError, match=r"the old name of method\.tokens_per_pack"):
        recipe_from_table({**table, "stages": [stage]})
    stage = {"name": "a", "steps": 1, "noise_draws": 5, "method": "supervised"}
    with pytest.raises(ConfigError, match=r"stages\.0\.method: must be a table"):
        recipe_from_table({**table, "stages": [stage]})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "dreaming"}, r"method: kind: unknown method 'dreaming'; known are supervised"),
        ({"kind": 3}, r"method: kind: unknown method '3'; known are supervised"),
        ([], r"stages\.0\.method: must be a table"),
        ({"noise_draws": 0}, r"method\.noise_draws: must be within \[1, 65536\], got 0"),
        ({"loss": {"beta": 1}}, r"method\.loss\.beta is not a field"),
        (
            {"kind": "nft", "prompts": {"kind": "scenes", "widht": 64}},
            r"method\.prompts\.widht is not a field of a recipe; did you mean 'width'",
        ),
    ],
)
def test_wrong_method_tables_are_refused(method: Any, message: str) -> None:
    table: dict[str, Any] = {"name": "x", "model": {"preset": "scenes"}}
    with pytest.raises(ConfigError, match=message):
        recipe_from_table({**table, "stages": [{"name": "a", "steps": 1, "method": method}]})


def test_a_checkpoint_gains_rows_for_the_words_its_tokenizer_learns(tmp_path: Path) -> None:
    wide = read_recipe(FOLDER / "scenes_wide.toml")
    old = load(bundled_model())
    before = old.tokenizer.vocab_size
    size = before + 48
    model = replace(
        wide.model,
        checkpoint=bundled_model(),
        changes={},
        tokenizer=TokenizerRecipe(vocab_size=size, samples=2000),
    )
    stages = tuple(
        replace(s, steps=2, compile=False, method=replace(supervised(s), tokens_per_pack=600))
        for s in wide.stages
    )
    recipe = replace(wide, model=model, stages=stages, workers=0)
    setup = build_setup(recipe, torch.device("cpu"), tmp_path)
    text = "a red circle"
    assert setup.tokenizer.vocab_size == setup.model.config.vocab_size == size
    assert setup.tokenizer.encode(text) == old.tokenizer.encode(text)
    for name, value in old.model.named_parameters():
        grown = weights(setup)[name]
        assert torch.equal(grown[: len(value)], value.float()), name
    gained = [setup.tokenizer.token_bytes(n) for n in range(before, size)]
    upper = next(
        t
        for t in gained
        if t.isascii() and t.strip() and len(old.tokenizer.encode(t.decode().lower())) == 1
    )
    row = setup.model.embed_tokens.weight[before + gained.index(upper)]
    read_as = old.tokenizer.encode(upper.decode().lower())[0]
    assert torch.equal(row, old.model.embed_tokens.weight[read_as].float())
    train(recipe, setup, tmp_path)
    again = build_setup(recipe, torch.device("cpu"), tmp_path)
    assert again.tokenizer.digest() == setup.tokenizer.digest()
    assert load(tmp_path / "model").model.config.vocab_size == size


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "scenes", "sizes": [[64, 64, 0]]},
        {"kind": "scenes", "sizes": [[64, 64, 1], [64, 64, 1]]},
        {"kind": "scenes", "sizes": [[64, 16, 1]]},
        {"kind": "scenes", "sizes": [[64, 64, 1]], "side": 64},
        {"kind": "scenes", "wording": 1.5},
        {"kind": "jsonl", "path": "x.jsonl", "wording": 0.5},
    ],
)
def test_wordings_and_sizes_out_of_range_are_refused(data: dict[str, Any]) -> None:
    stage = {"name": "a", "steps": 1, "data": [data]}
    with pytest.raises(ConfigError):
        recipe_from_table({"name": "x", "model": {"preset": "scenes"}, "stages": [stage]})
