"""Setup of a run from its recipe: model, frozen parts, tokenizer, sources, trained sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from neounify.attention import select
from neounify.checkpoint.names import part_of, stream_of
from neounify.checkpoint.reader import CheckpointFolder
from neounify.config import ModelConfig, VideoConfig
from neounify.config.presets import PRESETS
from neounify.config.ranges import check_names
from neounify.data.configs import DataConfig
from neounify.data.sources import Mixture, SampleSource
from neounify.distributed.parallelize import Parallel, parallelize
from neounify.distributed.ranks import ONE, Ranks
from neounify.errors import CheckpointError, ConfigError
from neounify.files import atomic_folder
from neounify.lora.layers import add_lora, lora_layers
from neounify.model.build import check_compile, meta_model
from neounify.model.neo import NeoUnify
from neounify.model.stream import Layer
from neounify.pipeline.loading import load_processor
from neounify.text.forms import TEMPLATES
from neounify.text.tokenizer import Tokenizer, byte_tokenizer
from neounify.train.parallel import parallelize_run
from neounify.train.recipe import ModelRecipe, Recipe, StageRecipe, TokenizerRecipe
from neounify.train.weights import (
    ChangedWeights,
    CheckpointWeights,
    FreshWeights,
    GrownWeights,
    Weights,
    fill,
)

TOKENIZER_SEED = 2**31
"""Seed of the samples that a tokenizer is trained on; no training run uses it."""


Keeping: TypeAlias = tuple[Any, ...]
"""What is frozen and how it is kept, where that is not in float32 shards on the devices."""


@dataclass(frozen=True, eq=False)
class TrainSetup:
    """A float32 model to train, spread over the ranks of a run, with tokenizer and system message
    of its checkpoint."""

    parallel: Parallel
    tokenizer: Tokenizer
    system_message: str
    keeping: Keeping = ()

    @property
    def model(self) -> NeoUnify:
        return self.parallel.objective.model

    @property
    def ranks(self) -> Ranks:
        return self.parallel.ranks

    def of_model(self, model: NeoUnify) -> TrainSetup:
        """The same setup around another model, which one rank holds."""
        return replace(self, parallel=parallelize(model, ONE))


class Start(NamedTuple):
    """What a run starts from, before there is a model."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    system_message: str


def build_setup(
    recipe: Recipe, device: torch.device, folder: Path, ranks: Ranks = ONE
) -> TrainSetup:
    """The checkpoint or the fresh model a recipe starts from; collective.

    Each rank reads the rows of the weights that it holds, one parameter after the other. A new
    tokenizer is saved in the run's `folder`: its training data may change before a resume. Raises
    CheckpointError, ConfigError and TokenizerError.
    """

    # The first rank saves the tokenizer that the others read.
    first = ranks.together(lambda: start_of(recipe, folder) if ranks.first else None)
    config, weights, tokenizer, message = ranks.together(lambda: first or start_of(recipe, folder))
    ranks.together(lambda: check_stages(recipe, config, device))
    model = meta_model(config)
    parallel = parallelize_run(recipe, model, ranks, device)
    ranks.together(lambda: fill(model, weights, device))
    return TrainSetup(parallel, tokenizer, message)


def check_stages(recipe: Recipe, config: ModelConfig, device: torch.device) -> None:
    """ConfigError for a stage that a device cannot run as it is set."""
    for stage in recipe.stages:
        dtype = torch.bfloat16 if stage.residual == "bfloat16" else torch.float32
        try:
            select(device, dtype, config.head_dim, stage.attention)
            if stage.compile:
                check_compile(device)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error


def start_of(recipe: Recipe, folder: Path) -> Start:
    """What a recipe starts from; no weights are read yet. Raises as `build_setup` does."""
    checkpoint = recipe.model.checkpoint is not None
    return (_of_checkpoint if checkpoint else _of_fresh)(recipe, folder)


def _of_checkpoint(recipe: Recipe, folder: Path) -> Start:
    source = recipe.model
    assert source.checkpoint is not None
    checkpoint = _opened(source.checkpoint)
    if not checkpoint.config.lm_head:
        raise CheckpointError(f"{source.checkpoint} has no lm_head: it cannot be trained on")
    processor = load_processor(checkpoint, torch.float32)
    tokenizer, config = processor.tokenizer, _config(checkpoint.config, source)
    stored = CheckpointWeights(checkpoint)
    weights: Weights = ChangedWeights(stored, config, recipe.seed) if source.changes else stored
    settings = source.tokenizer
    if settings is not None and settings.vocab_size > tokenizer.vocab_size:
        grown = _saved(folder, config, partial(_extended, tokenizer, recipe, settings))
        config = config.replace(vocab_size=max(grown.vocab_size, config.vocab_size))
        weights, tokenizer = GrownWeights(weights, config, tokenizer, grown), grown
    config = with_trained_sizes(config, recipe)
    _check_ids(tokenizer, config)
    return Start(config, weights, tokenizer, processor.system_message)


def _of_fresh(recipe: Recipe, folder: Path) -> Start:
    source = recipe.model
    config = with_trained_sizes(_config(PRESETS.get(source.preset or ""), source), recipe)
    tokenizer = _saved(folder, config, partial(_tokenizer, recipe, config))
    _check_ids(tokenizer, config)
    return Start(config, FreshWeights(config, recipe.seed), tokenizer, source.system_message)


def _check_ids(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )


def recipe_config(recipe: Recipe) -> ModelConfig:
    """The config of the model that a recipe trains; of a checkpoint only config.json and headers.

    Raises CheckpointError and ConfigError.
    """
    source = recipe.model
    if source.checkpoint is None:
        return _config(PRESETS.get(source.preset or ""), source)
    return _config(_opened(source.checkpoint).config, source)


def _opened(path: Path) -> CheckpointFolder:
    if not path.exists():
        raise CheckpointError(
            f"model.checkpoint {path} does not exist; if another recipe writes it, train that first"
        )
    return CheckpointFolder.open(path)


def _saved(folder: Path, config: ModelConfig, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of a run's folder; made and saved there at its start."""
    saved = folder / "tokenizer"
    if saved.is_dir():
        return Tokenizer.from_folder(saved, TEMPLATES[config.template].tokens)
    tokenizer = make()
    _save_tokenizer(tokenizer, saved)
    return tokenizer


class StageSources:
    """The mixtures of a recipe's stages; a source that several stages share is indexed once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._built: list[tuple[DataConfig, SampleSource]] = []

    def of(self, stage: StageRecipe) -> Mixture:
        """The mixture of one stage. Raises DataError, for a stage without data too."""
        weights = [data.weight for data in stage.data]
        return Mixture(list(zip(self.list(stage), weights, strict=True)), self.recipe.seed)

    def list(self, stage: StageRecipe) -> list[SampleSource]:
        """The sources of one stage, which may be none. Raises DataError."""
        return [self._source(data) for data in stage.data]

    def _source(self, data: DataConfig) -> SampleSource:
        alike = replace(data, weight=1.0)
        for built, source in self._built:
            if built == alike:
                return source
        source = data.build()
        self._built.append((alike, source))
        return source


def _config(base: ModelConfig | None, source: ModelRecipe) -> ModelConfig:
    if base is None:
        raise ConfigError(f"preset {source.preset!r} is unknown; known: {', '.join(PRESETS)}")
    try:
        return base.replace(**_checked_changes(base, source.changes, "model.changes"))
    except TypeError as error:
        raise ConfigError(f"model.changes: {error}") from error


def _checked_changes(base: Any, changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Changes of a config whose names and types are those of its fields; tables go into theirs."""
    known = [item.name for item in fields(base) if item.name != "published"]
    try:
        check_names(where, changes, known)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    checked: dict[str, Any] = {}
    for name, value in changes.items():
        before = getattr(base, name)
        if name == "video" and before is None and isinstance(value, Mapping):
            before = VideoConfig()
        if is_dataclass(before) and isinstance(value, Mapping):
            inner = _checked_changes(before, value, f"{where}.{name}")
            checked[name] = replace(before, **inner)  # type: ignore[type-var]
            continue
        if isinstance(before, tuple) and isinstance(value, list):
            value = tuple(value)
        if isinstance(before, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(before):
            raise ConfigError(
                f"{where}.{name}: must be {_kind(before)} such as {before!r}, got {value!r}"
            )
        checked[name] = value
    return checked


def _kind(value: Any) -> str:
    return "a table" if is_dataclass(value) else type(value).__name__


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Written aside and moved into place: a run killed meanwhile must find none, not a half."""
    try:
        with atomic_folder(folder) as aside:
            tokenizer.save(aside)
    except OSError as error:
        raise CheckpointError(f"the tokenizer {folder} could not be saved: {error}") from error


def _tokenizer(recipe: Recipe, config: ModelConfig) -> Tokenizer:
    """A tokenizer with the tokens that the model's prompts need."""
    settings, required = (
        recipe.model.tokenizer or TokenizerRecipe(),
        TEMPLATES[config.template].tokens,
    )
    texts = _tokenizer_texts(recipe, settings.samples)
    return byte_tokenizer(texts, settings.vocab_size, required)


def _extended(tokenizer: Tokenizer, recipe: Recipe, settings: TokenizerRecipe) -> Tokenizer:
    return tokenizer.extended(_tokenizer_texts(recipe, settings.samples), settings.vocab_size)


def _tokenizer_texts(recipe: Recipe, samples: int) -> list[str]:
    """Texts of the recipe's first synthetic world that no training run sees. Raises ConfigError."""
    data = (item for stage in recipe.stages for item in stage.data)
    world = next((w for item in data if (w := item.unseen(TOKENIZER_SEED)) is not None), None)
    if world is None:
        raise ConfigError(
            "the tokenizer of a fresh model is trained on a synthetic world, but no stage has data "
            'of kind "scenes" or "motion"'
        )
    return [world[n].text() for n in range(samples)]


def with_trained_sizes(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The config with the image sizes of all stages of a recipe, besides those it already has."""
    sampling = config.sampling
    sizes = list(sampling.trained_sizes)
    areas = [] if sampling.trained_pixels is None else [sampling.trained_pixels]
    for stage in recipe.stages:
        of_stage = stage.method.trained_sizes(stage, config)
        sizes += of_stage[0]
        areas += of_stage[1]
    sampling = replace(
        sampling,
        trained_sizes=tuple(dict.fromkeys(sizes)),
        trained_pixels=(min(a[0] for a in areas), max(a[1] for a in areas)) if areas else None,
    )
    return config.replace(sampling=sampling)


def checkpoint_layers(model: NeoUnify, enabled: bool) -> None:
    """Let every layer store its input only and recompute the rest in the backward pass.

    A third more computation; memory holds one layer's activations instead of all layers'
    (Chen et al. 2016). `enabled` False restores the plain layers.
    """
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.recompute = enabled


def prepare_parameters(model: NeoUnify, stage: StageRecipe, seed: int) -> None:
    """Add the adapters of a stage, drawn from `seed`, unless the model has them, or freeze what a
    stage without LoRA freezes.

    Raises ConfigError for names that the model does not have.
    """
    if stage.lora is None:
        model.stack_experts()
        freeze(model, stage.freeze, stage.freeze_last_layers)
    elif not lora_layers(model):
        add_lora(model, stage.lora, seed)


def freeze(model: NeoUnify, names: tuple[str, ...], last_layers: int = 0) -> None:
    """Train every parameter but those of the named streams and parts, and of the last layers.

    Raises ConfigError.
    """
    known: set[str] = set()
    first_frozen = model.config.num_layers - last_layers
    if first_frozen < 0:
        raise ConfigError(
            f"freeze_last_layers must be at most the model's {model.config.num_layers} layers, "
            f"got {last_layers}"
        )
    for name, parameter in model.named_parameters():
        labels = {stream_of(name), part_of(name)}
        known |= labels
        unread = part_of(name) == "timestep" and not model.config.flow.time_embedding
        is_last = name.startswith("layers.") and int(name.split(".")[1]) >= first_frozen
        parameter.requires_grad_(not (labels & set(names) or is_last or unread))
    unknown = set(names) - known
    if unknown:
        raise ConfigError(f"freeze: {sorted(unknown)} unknown; known are {sorted(known)}")
