"""Setup of a run from its recipe: model, frozen parts, tokenizer, sources, trained sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neounify.checkpoint.names import each_expert, part_of, stream_of
from neounify.checkpoint.reader import CheckpointFolder
from neounify.config import ModelConfig
from neounify.config.presets import PRESETS
from neounify.config.ranges import check_names
from neounify.data.sources import DataConfig, Mixture, SampleSource
from neounify.errors import CheckpointError, ConfigError
from neounify.files import atomic_folder
from neounify.lora.layers import add_lora
from neounify.model.neo import NeoUnify
from neounify.model.stream import Layer
from neounify.pipeline import load
from neounify.scenes.world import SceneDataset, scene_config
from neounify.scenes.world.samples import SceneData
from neounify.text.tokenizer import Tokenizer, byte_of_character, byte_tokenizer
from neounify.train.recipe import ModelRecipe, Recipe, StageRecipe, TokenizerRecipe

TOKENIZER_SEED = 2**31
"""Seed of the samples that a tokenizer is trained on; no training run uses it."""


@dataclass(frozen=True, eq=False)
class TrainSetup:
    """A float32 model to train, with the tokenizer and system message of its checkpoint."""

    model: NeoUnify
    tokenizer: Tokenizer
    system_message: str


def build_setup(recipe: Recipe, device: torch.device, folder: Path) -> TrainSetup:
    """The checkpoint or the fresh model a recipe starts from. Raises the errors of `load`.

    A new tokenizer is saved in the run's `folder`: its training data may change before a resume.
    """
    source = recipe.model
    if source.checkpoint is not None:
        pipe = load(source.checkpoint, dtype=torch.float32, device=device)
        if not pipe.config.lm_head:
            raise CheckpointError(f"{source.checkpoint} has no lm_head: it cannot be trained on")
        tokenizer, model = pipe.tokenizer, _changed(pipe.model, source, recipe.seed)
        if source.tokenizer is not None and source.tokenizer.vocab_size > tokenizer.vocab_size:
            tokenizer = _saved(folder, partial(_extended, tokenizer, recipe, source.tokenizer))
            model = _with_rows(model, pipe.tokenizer, tokenizer, recipe.seed)
        model.config = with_trained_sizes(model.config, recipe)
        return TrainSetup(model.train(), tokenizer, pipe.processor.system_message)
    config = with_trained_sizes(_config(PRESETS.get(source.preset or ""), source), recipe)
    tokenizer = _saved(folder, partial(_tokenizer, recipe))
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )
    return TrainSetup(new_model(config, recipe.seed).to(device), tokenizer, source.system_message)


def recipe_config(recipe: Recipe) -> ModelConfig:
    """The config of the model that a recipe trains; of a checkpoint only config.json and headers.

    Raises CheckpointError and ConfigError.
    """
    source = recipe.model
    if source.checkpoint is None:
        return _config(PRESETS.get(source.preset or ""), source)
    return _config(CheckpointFolder.open(source.checkpoint).config, source)


def _saved(folder: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of a run's folder; made and saved there at its start."""
    saved = folder / "tokenizer"
    if saved.is_dir():
        return Tokenizer.from_folder(saved)
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


def _changed(model: NeoUnify, source: ModelRecipe, seed: int) -> NeoUnify:
    """A checkpoint's model with the recipe's changes; what they add has fresh weights, but layers
    are repeated.
    """
    if not source.changes:
        # Mapped weights are the file's own pages; training needs memory it may write to.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model.requires_grad_(True)
    changed = new_model(_config(model.config, source), seed).to(model.device)
    old = each_expert(dict(model.named_parameters()))
    origins = _layer_origins(model.config.num_layers, changed.config.num_layers)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            origin, repeats = _origin(name, origins)
            if origin in old and old[origin].shape == parameter.shape:
                parameter.copy_(old[origin])
                if repeats and name.endswith(RESIDUAL):
                    parameter.zero_()
    return changed


def _layer_origins(old: int, new: int) -> list[int]:
    """The old layer that each new one is copied from; where there are more, spread evenly."""
    return [number * old // new for number in range(new)] if new > old else list(range(new))


def _origin(name: str, origins: Sequence[int]) -> tuple[str, bool]:
    """The parameter that a new one is copied from, and whether its layer repeats the one before.

    A repeated layer starts with nothing to add to its input, so a deeper model begins with the
    results of the old one (LLaMA Pro, arXiv 2401.02415).
    """
    if not name.startswith("layers."):
        return name, False
    _, number, rest = name.split(".", 2)
    layer = int(number)
    origin = origins[layer]
    return f"layers.{origin}.{rest}", layer > 0 and origins[layer - 1] == origin


_TABLES = ("embed_tokens.weight", "lm_head.weight")


def _with_rows(model: NeoUnify, old: Tokenizer, new: Tokenizer, seed: int) -> NeoUnify:
    """The model with table rows for the ids that a tokenizer gained.

    A new token is read as its lower-case spelling if that was one token, else as the mean of the
    tokens that it joins; as an answer, each is as likely as the mean token.
    """
    size = max(new.vocab_size, model.config.vocab_size)
    grown = new_model(model.config.replace(vocab_size=size), seed).to(model.device)
    before = each_expert(dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            rows = slice(len(before[name])) if name in _TABLES else ...
            parameter[rows].copy_(before[name])
        embedding, head = (before[name] for name in _TABLES)
        for token in range(old.vocab_size, new.vocab_size):
            parts = _parts(new.token_bytes(token), old)
            grown.embed_tokens.weight[token] = embedding[parts].mean(0)
            grown.lm_head.weight[token] = head.mean(0)
    return grown


def _parts(token: bytes, old: Tokenizer) -> list[int]:
    """The ids of an older tokenizer that a token stands for."""
    try:
        text = token.decode()
    except UnicodeDecodeError:  # a part of a character
        spelt = {byte: character for character, byte in byte_of_character().items()}
        return [old.id(spelt[byte]) for byte in token]
    lower = old.encode(text.lower())
    return lower if len(lower) == 1 else old.encode(text)


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


def _tokenizer(recipe: Recipe) -> Tokenizer:
    settings = recipe.model.tokenizer or TokenizerRecipe()
    return byte_tokenizer(_tokenizer_texts(recipe, settings.samples), settings.vocab_size)


def _extended(tokenizer: Tokenizer, recipe: Recipe, settings: TokenizerRecipe) -> Tokenizer:
    return tokenizer.extended(_tokenizer_texts(recipe, settings.samples), settings.vocab_size)


def _tokenizer_texts(recipe: Recipe, samples: int) -> list[str]:
    """Texts of the recipe's first scenes that no training run sees. Raises ConfigError."""
    data = (item for stage in recipe.stages for item in stage.data)
    scenes = [item for item in data if isinstance(item, SceneData)]
    if not scenes:
        raise ConfigError(
            "the tokenizer of a fresh model is trained on synthetic scenes, but no stage has data "
            'of kind "scenes"'
        )
    first = scenes[0]
    world = SceneDataset(
        TOKENIZER_SEED, scene_config(first.world), chinese=first.chinese, wording=first.wording
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


RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""Weights that write into the residual stream: scaled by 1/√(2 · layers), as in GPT-2."""


def new_model(config: ModelConfig, seed: int) -> NeoUnify:
    """A model with fresh weights, the same for the same seed; float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NeoUnify(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                _fill(name, parameter, config)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    return model


def _fill(name: str, parameter: nn.Parameter, config: ModelConfig) -> None:
    fan_in = parameter[0].numel()
    std = 1 / math.sqrt(fan_in)
    if name.endswith(RESIDUAL):
        std /= math.sqrt(2 * config.num_layers)
    elif name == "embed_tokens.weight":
        std = 0.5
    elif name == "lm_head.weight":
        std /= 2
    nn.init.normal_(parameter, std=std)


def checkpoint_layers(model: NeoUnify, enabled: bool) -> None:
    """Let every layer store its input only and recompute the rest in the backward pass.

    A third more computation; memory holds one layer's activations instead of all layers'
    (Chen et al. 2016). `enabled` False restores the plain layers.
    """
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.recompute = enabled


def prepare_parameters(model: NeoUnify, stage: StageRecipe, seed: int) -> None:
    """Add the adapters of a stage, drawn from `seed`, or freeze what a stage without LoRA freezes.

    Raises ConfigError for names that the model does not have, and where it has adapters already.
    """
    if stage.lora is None:
        model.stack_experts()
        freeze(model, stage.freeze, stage.freeze_last_layers)
    else:
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
        is_last = name.startswith("layers.") and int(name.split(".")[1]) >= first_frozen
        parameter.requires_grad_(not labels & set(names) and not is_last)
    unknown = set(names) - known
    if unknown:
        raise ConfigError(f"freeze: {sorted(unknown)} unknown; known are {sorted(known)}")
