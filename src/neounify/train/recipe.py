"""Recipe: a training run as a TOML file with its model, data and stages.

    name = "scenes"
    [model]
    preset = "scenes"            # or: checkpoint = "folder"
    [defaults]                   # what all stages share
    method = { kind = "supervised", tokens_per_pack = 4096 }
    [[stages]]
    name = "joint"
    steps = 10000
    method = { noise_draws = 2 }
    [[stages.data]]
    kind = "scenes"
    [stages.optimizer]
    learning_rate = 1e-3

A stage's values take precedence over the defaults, table by table. An unknown field is an
error. Field names of earlier versions work with a DeprecationWarning.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from neounify.attention import check_backend
from neounify.config.ranges import (
    STRICT,
    BelowOne,
    Count,
    NonNegativeInt,
    Positive,
    Range,
    Seed,
    check_names,
    closest,
    kind_class,
)
from neounify.data.configs import DataConfig, read_data
from neounify.distributed.mesh import ParallelConfig
from neounify.errors import ConfigError
from neounify.files import read_text
from neounify.lora.layers import LoraConfig
from neounify.model.parts import LABELS, STREAMS
from neounify.text import IMAGE_MARK
from neounify.text.tokenizer import BYTE_VOCAB_SIZE
from neounify.train.method import DEFAULT_METHOD, METHODS, MethodConfig, read_method
from neounify.train.optim import OptimizerConfig, Schedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_RECIPE_BYTES = 2**18
MAX_WORKERS = 1024
MAX_PACKS_PER_STEP = 2**16
MAX_NAME_CHARS = 200

RENAMED = {
    "budget": ("method", "tokens_per_pack"),
    "tokens_per_pack": ("method", "tokens_per_pack"),
    "target_pixels": ("method", "target_pixels"),
    "target_buckets": ("method", "target_buckets"),
    "input_pixels": ("method", "input_pixels"),
    "most_nonfinite": ("max_nonfinite",),
    "objective": ("method", "loss"),
    "dropout": ("method", "guidance_dropout"),
    "noise_draws": ("method", "noise_draws"),
}
"""Fields of a stage under the names of earlier versions, and where they are now."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerRecipe:
    """A byte-level tokenizer of at most `vocab_size` ids, trained on `samples` samples."""

    vocab_size: Annotated[int, AfterValidator(Range(BYTE_VOCAB_SIZE))] = 512
    samples: Count = 4000


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelRecipe:
    """Source of the weights: a checkpoint folder, or a preset with fresh weights.

    `changes` replace fields of the config; of a checkpoint, what they add or reshape starts from
    fresh weights (a pixel head in place of the flow head). `system_message` is for fresh models; a
    checkpoint contains one. `tokenizer` is that of a fresh model, of 512 ids by default. A
    checkpoint keeps its own; if `tokenizer.vocab_size` is larger, it gains merges of the recipe's
    texts, and the model rows for them.
    """

    preset: str | None = None
    checkpoint: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerRecipe | None = None
    system_message: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageRecipe:
    """One stage of training by a method. A step is `packs_per_step` of the method's batches.

    `method` is a table with a `kind` of `METHODS` and the fields of its config; `data` are tables
    with a `kind` of `FORMATS`, which the method draws from. `freeze` names streams ("und", "gen",
    and "shared": token embedding and lm head) or parts of the model (checkpoint/names.py).
    """

    name: str
    steps: Count
    data: tuple[Annotated[DataConfig, PlainValidator(read_data)], ...] = field(
        default_factory=lambda: (read_data({}),)
    )
    freeze: tuple[str, ...] = ()
    freeze_last_layers: NonNegativeInt = 0
    """Freeze the last so many layers as well, in both streams."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights; they are saved beside the merged model."""
    method: Annotated[MethodConfig, PlainValidator(read_method)] = field(
        default_factory=lambda: read_method({})
    )
    packs_per_step: Annotated[int, AfterValidator(Range(1, MAX_PACKS_PER_STEP))] = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule = field(default_factory=Schedule)
    clip: Positive = 1.0
    ema: BelowOne = 0.9999
    precision: Literal["float32", "bfloat16"] = "float32"
    residual: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the residual stream, of which every layer keeps its input. In bfloat16 precision
    that of noisy images is bfloat16 in any case."""
    frozen_weights: Literal["float32", "bfloat16"] = "float32"
    """Dtype that frozen weights are kept in on many ranks."""
    ema_memory: Literal["device", "host"] = "device"
    """Where the mean of the weights (EMA) is kept; on the host a step waits for a copy of them."""
    checkpoint_activations: bool = False
    """Store only the input of each layer and recompute the rest in the backward pass."""
    compile: bool = False
    attention: str = "auto"
    """Attention backend, see `neounify.attention.BACKENDS`."""
    max_nonfinite: Count = 10
    """Steps in a row without a finite loss and gradient after which training stops."""
    log_every: Count = 20
    save_every: Count = 500
    sample_every: Count = 1000

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name: a stage needs a name that is not blank")
        if not self.data and self.method.needs_data:
            raise ValueError(
                f"data: the method {self.method.kind} needs at least one source of data"
            )
        check_names("freeze", self.freeze, LABELS)
        try:
            check_backend(self.attention)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if (self.freeze or self.freeze_last_layers) and self.lora is not None:
            raise ValueError(
                "freeze: a stage with lora trains its adapters alone, all weights are frozen; "
                "leave freeze out, and choose the layers by lora.streams, lora.modules and "
                "lora.layers"
            )
        for name in ("residual", "frozen_weights"):
            if getattr(self, name) == "bfloat16" and self.precision != "bfloat16":
                raise ValueError(f'{name}: "bfloat16" needs precision = "bfloat16"')
        if self.residual not in self.method.residuals:
            raise ValueError(f"residual: the method {self.method.kind} has it in float32")
        if self.frozen_weights == "bfloat16" and self.lora is not None:
            raise ValueError("frozen_weights: beside adapters the weights stay float32")
        if {*STREAMS, "shared"} <= set(self.freeze):
            raise ValueError(f"freeze: {list(self.freeze)} leaves nothing to train")
        self.method.check_stage(self)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A whole run. `keep` checkpoints stay; `workers` processes load data, on each rank.

    `folder` is that of the recipe's file, where programs that it names are looked for. `parallel`
    says how the run is spread over ranks, by default in shards over all there are.
    """

    name: str
    model: ModelRecipe
    stages: tuple[StageRecipe, ...]
    seed: Seed = 0
    workers: Annotated[int, AfterValidator(Range(0, MAX_WORKERS))] = 1
    keep: Count = 2
    parallel: ParallelConfig | None = None
    prompts: tuple[str, ...] = ()
    """Prompts of the periodic sample grid; by default those of the first samples."""
    folder: Path | None = None

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a recipe needs stages with different names, got {names}")
        if (self.model.preset is None) == (self.model.checkpoint is None):
            raise ValueError("the model needs either a preset or a checkpoint")
        parts = Path(self.name).parts
        named = self.name.isprintable() and len(self.name) <= MAX_NAME_CHARS
        if not named or not self.name.strip() or not parts or ".." in parts or parts[0] == "/":
            raise ValueError(f"name: {self.name[:80]!r} cannot name the folder of a run")
        for prompt in self.prompts:
            if not prompt.strip() or IMAGE_MARK in prompt:
                raise ValueError(f"prompts: {prompt!r} must be text, without {IMAGE_MARK}")

    @property
    def streams(self) -> int:
        """Data streams: those of `parallel`, without it as many as there are workers."""
        return self.parallel.streams if self.parallel else max(1, self.workers)


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe. Raises ConfigError that names the file and the field."""
    try:
        table = tomllib.loads(read_text(path, MAX_RECIPE_BYTES, ConfigError))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply") from error
    try:
        return recipe_from_table(table, path.parent)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def recipe_from_table(table: Mapping[str, Any], folder: Path | None = None) -> Recipe:
    """A recipe from the parsed TOML of a file in `folder`, defaults applied. Raises ConfigError."""
    values = dict(table)
    if "folder" in values:
        raise ConfigError("folder is not a field of a recipe")
    values["folder"] = None if folder is None else str(folder)
    defaults = values.pop("defaults", {})
    stages = values.get("stages", [])
    if not isinstance(defaults, dict) or not isinstance(stages, list):
        raise ConfigError("[defaults] must be a table and [[stages]] a list of tables")
    defaults = _renamed(defaults, "defaults")
    if isinstance(defaults.get("method"), dict):
        # So that a stage of another method does not take over its fields.
        defaults["method"] = {"kind": DEFAULT_METHOD, **defaults["method"]}
    values["stages"] = [
        _merged(defaults, _renamed(stage, f"stages.{number}")) if isinstance(stage, dict) else stage
        for number, stage in enumerate(stages)
    ]
    try:
        # As JSON, so that strict validation takes lists for tuples but no text for numbers.
        return TypeAdapter(Recipe).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_explain(item, values) for item in error.errors()[:5])
        ) from error


def _renamed(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A stage's table with names of earlier versions replaced. Raises ConfigError for both."""
    values, used = dict(table), []
    for old, (name, *inner) in RENAMED.items():
        if old not in values:
            continue
        new = ".".join((name, *inner))
        value = values.pop(old)
        holder, key = values, name
        if inner:
            if not isinstance(values.get(name, {}), dict):
                raise ConfigError(f"{where}.{name}: must be a table, got {values[name]!r:.60}")
            holder, key = dict(values.get(name, {})), inner[0]
            values[name] = holder
        if key in holder:
            raise ConfigError(f"{where}: {old} is the old name of {new}; give {new} alone")
        holder[key] = value
        used.append(f"{where}: {old} is deprecated, use {new}")
    for message in used:
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    return values


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, table by table; tables of another kind are replaced."""
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and _same_kind(before, value):
            merged[key] = _merged(before, value)
        else:
            merged[key] = value
    return merged


def _same_kind(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return "kind" not in one or "kind" not in other or one["kind"] == other["kind"]


def _explain(item: Any, values: Mapping[str, Any]) -> str:
    *holder, name = item["loc"] or ("recipe",)
    where = ".".join(str(part) for part in (*holder, name))
    if item["type"] == "unexpected_keyword_argument":
        known = _known_fields(values, holder)
        listed = f"{closest(str(name), known)}known are {', '.join(known)}"
        return f"{where} is not a field of a recipe; {listed}"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] in ("value_error", "missing") else f", got {item['input']!r:.60}"
    return f"{where}: {message}{got}"


def _known_fields(values: Any, place: Sequence[int | str]) -> list[str]:
    """Names of the settings of a table of a recipe, such as ("stages", 0, "optimizer")."""
    table: type = Recipe
    for part in place:
        values = values[part]
        if part == "method":
            table = kind_class(str(values.get("kind", DEFAULT_METHOD)), METHODS, "method")
        elif isinstance(part, str):
            table = next(_dataclasses(get_type_hints(table)[part]))
    return [item.name for item in fields(table) if item.name != "folder"]


def _dataclasses(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses(argument)
