"""A training run as data: a TOML file that names the model, its data and its stages.

    name = "scenes"
    [model]
    preset = "scenes"            # or: checkpoint = "folder"
    [defaults]                   # what all stages share
    budget = 4096
    [[stages]]
    name = "joint"
    steps = 10000
    [[stages.data]]
    kind = "scenes"
    [stages.optimizer]
    learning_rate = 1e-3

A stage's own values go before the defaults, table by table. Every field is known and checked;
an unknown one is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from neounify.data.encode import GuidanceDropout
from neounify.errors import ConfigError
from neounify.lora.layers import LoraConfig
from neounify.settings import STRICT
from neounify.train.objective import Objective
from neounify.train.optimizers import OptimizerConfig, Schedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_RECIPE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerRecipe:
    """A byte-level tokenizer of at most `vocab_size` ids, learnt from `samples` samples."""

    vocab_size: int = 512
    samples: int = 4000


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelRecipe:
    """Where the weights come from: a checkpoint folder, or a preset with fresh weights.

    `changes` replace fields of the config; of a checkpoint, what they add or reshape starts from
    fresh weights (a pixel head in place of the flow head). `tokenizer` and `system_message` are
    for fresh models; a checkpoint brings its own.
    """

    preset: str | None = None
    checkpoint: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    system_message: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataRecipe:
    """One source of a stage's mixture, drawn in proportion to `weight`.

    `scenes`: the made world (`world`, `tasks`, `chinese`, `side`, `seed`, `split`). `jsonl`: a
    file or folder of the published schema. `shards`: tar files, `path` may hold `*`. For both,
    `task` overrides what the records say, and `colour_profiles = false` takes all pixels for sRGB,
    as the published code does.
    """

    kind: Literal["scenes", "jsonl", "shards"] = "scenes"
    weight: float = 1.0
    world: str = "default"
    tasks: dict[str, float] | None = None
    chinese: float = 0.0
    side: int | None = None
    seed: int = 0
    split: Literal["train", "held_out", "any"] = "train"
    path: str | None = None
    task: str | None = None
    colour_profiles: bool = True

    def __post_init__(self) -> None:
        if self.kind != "scenes" and self.path is None:
            raise ValueError(f'data of kind "{self.kind}" needs a path')
        of_files, common = {"path", "task", "colour_profiles"}, {"kind", "weight"}
        for item in fields(self):
            foreign = item.name not in common and (item.name in of_files) == (self.kind == "scenes")
            if foreign and getattr(self, item.name) != item.default:
                raise ValueError(f'data of kind "{self.kind}" has no {item.name}')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageRecipe:
    """One stage. A step is `packs_per_step` packs of `budget` tokens each.

    `freeze` names streams ("und", "gen", and "shared": token embedding and lm head) or parts of
    the model (checkpoint/names.py).
    """

    name: str
    steps: int
    data: tuple[DataRecipe, ...] = field(default_factory=lambda: (DataRecipe(),))
    freeze: tuple[str, ...] = ()
    lora: LoraConfig | None = None
    """Train adapters instead of the weights; they are saved beside the merged model."""
    budget: int = 4096
    packs_per_step: int = 1
    noise_draws: int = 1
    target_pixels: tuple[int, int] | None = None
    target_buckets: tuple[tuple[int, int], ...] = ()
    dropout: GuidanceDropout = field(default_factory=GuidanceDropout)
    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule = field(default_factory=Schedule)
    clip: float = 1.0
    ema: float = 0.9999
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_activations: bool = False
    """Keep only what enters each layer and compute the rest again backward: less memory."""
    compile: bool = False
    most_nonfinite: int = 10
    log_every: int = 20
    save_every: int = 500
    sample_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "budget", "packs_per_step", "noise_draws", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.data:
            raise ValueError("a stage needs at least one source of data")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A whole run. `keep` checkpoints stay; `workers` processes load data."""

    name: str
    model: ModelRecipe
    stages: tuple[StageRecipe, ...]
    seed: int = 0
    workers: int = 1
    keep: int = 2
    prompts: tuple[str, ...] = ()
    """What is painted for the pictures of progress; captions of the first samples by default."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a recipe needs stages with names of their own, got {names}")
        if (self.model.preset is None) == (self.model.checkpoint is None):
            raise ValueError("the model needs either a preset or a checkpoint")


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe. Raises ConfigError that names the file and the field."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        return recipe_from_table(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def recipe_from_table(table: Mapping[str, Any]) -> Recipe:
    """A recipe from parsed TOML, defaults applied. Raises ConfigError."""
    values = dict(table)
    defaults = values.pop("defaults", {})
    stages = values.get("stages", [])
    if not isinstance(defaults, dict) or not isinstance(stages, list):
        raise ConfigError("[defaults] must be a table and [[stages]] a list of tables")
    values["stages"] = [
        _merged(defaults, stage) if isinstance(stage, dict) else stage for stage in stages
    ]
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors()[:5])) from error


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in own.items():
        before = found.get(key)
        both = isinstance(before, dict) and isinstance(value, dict)
        found[key] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return found


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "unexpected_keyword_argument":
        return f"{where} is not a field of a recipe"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"
