"""Every number and every name of a recipe has a range, and an error that says which."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from pydantic import AfterValidator, ValidationError

from neounify.bundled import bundled_model
from neounify.config.presets import SCENES
from neounify.config.ranges import Range
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoder
from neounify.data.sample import DataError
from neounify.data.shards import ShardData
from neounify.data.sources import JsonlData
from neounify.errors import ConfigError
from neounify.lora.layers import LoraConfig
from neounify.pipeline import Pipeline, load
from neounify.scenes.world.samples import SceneData
from neounify.text import byte_tokenizer
from neounify.train.loss import LossConfig
from neounify.train.optim import OptimizerConfig, Schedule
from neounify.train.recipe import (
    ModelRecipe,
    Recipe,
    StageRecipe,
    TokenizerRecipe,
    recipe_from_table,
)
from neounify.train.setup import build_setup
from neounify.train.supervised import SupervisedConfig

SETTINGS = (
    SceneData,
    JsonlData,
    ShardData,
    GuidanceDropout,
    LoraConfig,
    ModelRecipe,
    LossConfig,
    OptimizerConfig,
    Recipe,
    Schedule,
    StageRecipe,
    SupervisedConfig,
    TokenizerRecipe,
)
NEEDED: dict[type, dict[str, Any]] = {
    StageRecipe: {"name": "a", "steps": 1},
    Recipe: {
        "name": "a",
        "model": ModelRecipe(preset="scenes"),
        "stages": (StageRecipe(name="a", steps=1),),
    },
}
UNRESTRICTED = {("LoraConfig", "layers"), ("SupervisedConfig", "target_buckets")}
"""Checked as a whole, and tested below."""


def numbers(hint: Any) -> Iterator[type]:
    """int and float inside a type hint; bool is no number."""
    if hint in (int, float):
        yield hint
    for part in get_args(hint):
        if isinstance(part, type) or get_args(part):
            yield from numbers(part)


def numeric_fields() -> list[tuple[type, str]]:
    names: list[tuple[type, str]] = []
    for settings in SETTINGS:
        hints = get_type_hints(settings)
        for item in fields(settings):
            simple = [h for h in numbers(hints[item.name]) if h is not bool]
            if simple and (settings.__name__, item.name) not in UNRESTRICTED:
                names.append((settings, item.name))
    return names


FIELDS = numeric_fields()


def refusal(settings: type, name: str, value: object) -> str:
    needed = {k: v for k, v in NEEDED.get(settings, {}).items() if k != name}
    with pytest.raises(ValidationError) as raised:
        settings(**needed, **{name: value})
    return str(raised.value)


def test_all_numbers_are_found() -> None:
    names = {name for _, name in FIELDS}
    assert {"clip", "sample_every", "betas", "warmup", "dropout", "weight", "lr_scale"} <= names
    assert len(FIELDS) > 35


@pytest.mark.parametrize(("settings", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_out_of_range_name_their_field(settings: type, name: str) -> None:
    hint = str(get_type_hints(settings)[name])
    for bad in (math.nan, math.inf, -math.inf, -1, -1e9):
        if name in ("t_mean",) and math.isfinite(bad):
            continue
        value: object = bad
        if "tuple" in hint:
            value = (bad, bad)
        elif "Mapping" in hint or "dict" in hint:
            value = {"vqa" if "task" in name else "gen": bad}
        said = refusal(settings, name, value)
        assert name in said, said


def test_a_range_says_what_it_is() -> None:
    assert str(Range(1)) == "at least 1"
    assert str(Range(0, open_low=True)) == "above 0"
    assert str(Range(0, 1, open_high=True)) == "within [0, 1)"
    assert str(Range(0, 1, open_low=True)) == "within (0, 1]"
    assert isinstance(AfterValidator(Range(1)), AfterValidator)


def stage(**values: Any) -> dict[str, Any]:
    return {"stages": [{"name": "a", "steps": 1, **values}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stage(attention="flush"), "'flush' is unknown; known are auto, sdpa, blocks"),
        (stage(sample_every=0), r"stages\.0\.sample_every: must be at least 1, got 0"),
        (stage(clip=0.0), r"stages\.0\.clip: must be above 0, got 0"),
        (stage(ema=1.0), r"stages\.0\.ema: must be within \[0, 1\), got 1"),
        (stage(steps="10"), r"stages\.0\.steps: .*integer, got '10'"),
        (stage(steps=True), r"stages\.0\.steps: .*integer, got True"),
        (stage(steps=1.5), r"stages\.0\.steps: .*, got 1\.5"),
        (stage(name=" "), "a name that is not blank"),
        (
            stage(method={"target_pixels": [100, 10]}),
            r"\[least, greatest\] area .* got \[100, 10\]",
        ),
        (stage(method={"target_buckets": [[0, 32]]}), r"target_buckets\.0\.0: must be at least 1"),
        (stage(freeze=["gne"]), "freeze: unknown name 'gne'; did you mean 'gen'"),
        (stage(freeze=["und", "gen", "shared"]), "leaves nothing to train"),
        (stage(optimizer={"lr_scale": {"gne": 2.0}}), "unknown name 'gne'; did you mean 'gen'"),
        (stage(optimizer={"lr_scale": {"gen": -2.0}}), r"lr_scale\.gen: must be at least 0"),
        (stage(method={"loss": {"task_weights": {"vqq": 3.0}}}), "did you mean 'vqa'"),
        (stage(method={"loss": {"text_weight": 0, "image_weight": 0}}), "nothing to train"),
        (stage(method={"guidance_dropout": {"text": 0.6, "all": 0.6}}), "must be at most 1"),
        (stage(schedule={"name": "cosin"}), "schedule.name: .*'cosine'.* got 'cosin'"),
        (stage(lora={"layers": [3, 2]}), "first below stop"),
        (stage(data=[{"world": "esay"}]), "world: unknown name 'esay'; did you mean 'easy'"),
        (stage(data=[{"tasks": {"t2j": 1.0}}]), "did you mean 't2i'"),
        (stage(data=[{"tasks": {"t2i": 0.0}}]), "one share must be above 0"),
        (stage(data=[{"kind": "jsonl", "path": "x", "task": "pain"}]), "unknown task 'pain'"),
        (stage(data=[{"kind": "jsonl", "path": ""}]), "needs a path"),
        (stage(data=[{"kind": "shards", "path": "x", "images": "y"}]), "has no images"),
        ({"name": "../x"}, "cannot name the folder"),
        ({"seed": -1}, "seed: must be within"),
        ({"workers": -1}, "workers: must be within"),
        ({"prompts": [""]}, "prompts: '' must be text"),
        ({"model": {"preset": "scenes", "tokenizer": {"vocab_size": 3}}}, "vocab_size: must be at"),
    ],
)
def test_wrong_settings_are_refused_when_the_recipe_is_read(
    change: dict[str, Any], message: str
) -> None:
    table = {"name": "a", "model": {"preset": "scenes"}, **stage(), **change}
    with pytest.raises(ConfigError, match=message):
        recipe_from_table(table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layer": 2}, "did you mean 'num_layers'"),
        ({"num_layers": "2"}, r"model\.changes\.num_layers: must be int such as \d+, got '2'"),
        ({"num_layers": 2.5}, "must be int"),
        ({"flow": {"noise_scales": 1}}, r"model\.changes\.flow: unknown name"),
        ({"flow": 3}, "must be a table"),
        ({"flow": {"noise_scale": -1}}, "noise_scale must be positive"),
        ({"image_head": 3}, "must be str"),
    ],
)
def test_changes_of_a_model_are_checked(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    table = {"name": "a", "model": {"preset": "scenes", "changes": changes}, **stage()}
    with pytest.raises(ConfigError, match=message):
        build_setup(recipe_from_table(table), torch.device("cpu"), tmp_path)


def test_parts_of_a_config_can_be_changed(tmp_path: Path) -> None:
    changes = {"num_layers": 1, "flow": {"noise_scale": 2}, "sampling": {"image_size": [32, 64]}}
    model = {"preset": "scenes", "changes": changes, "tokenizer": {"samples": 50}}
    recipe = recipe_from_table({"name": "a", "model": model, **stage()})
    config = build_setup(recipe, torch.device("cpu"), tmp_path).model.config
    assert (config.flow.noise_scale, config.sampling.image_size) == (2.0, (32, 64))
    assert config.flow.noise_scale_mode == SCENES.flow.noise_scale_mode
    assert is_dataclass(config.flow)


def test_a_deeper_model_begins_with_the_results_of_the_old_one(tmp_path: Path) -> None:
    model = {"checkpoint": bundled_model(), "changes": {"num_layers": 12}}
    recipe = recipe_from_table({"name": "a", "model": model, **stage()})
    deeper = build_setup(recipe, torch.device("cpu"), tmp_path).model.eval()
    before = load(bundled_model(), dtype="float32")
    assert len(deeper.layers) == 12
    after = Pipeline(deeper, before.tokenizer, system_message=before.processor.system_message)
    one, two = (pipe.generate("a red circle", steps=2, seed=1).pixels for pipe in (before, after))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_buckets_consist_of_tokens() -> None:
    side = SCENES.token_size
    buckets = ((side, side), (side + 1, side))
    with pytest.raises(DataError, match=f"multiples of {side}"):
        Encoder(config=SCENES, tokenizer=byte_tokenizer(), target_buckets=buckets)
