"""From a recipe to what a run needs: model, tokenizer, sources, encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from neounify.config import ModelConfig
from neounify.data.encode import Encoder
from neounify.data.scenes import SceneDataset, scene_config
from neounify.data.source import Source
from neounify.errors import ConfigError
from neounify.model.neo import NeoUnify
from neounify.pipeline import load
from neounify.presets import PRESETS
from neounify.text.build import byte_tokenizer
from neounify.text.tokenizer import Tokenizer
from neounify.train.init import new_model
from neounify.train.recipe import DataRecipe, ModelRecipe, Recipe, StageRecipe

TOKENIZER_SEED = 2**31
"""Samples a tokenizer is learnt from have a seed that no training run uses."""


@dataclass(frozen=True, eq=False)
class Start:
    """A model as training finds it, in float32, with what goes beside it into a checkpoint."""

    model: NeoUnify
    tokenizer: Tokenizer
    system_message: str


def starting_model(recipe: Recipe, device: torch.device, folder: Path) -> Start:
    """The checkpoint or the fresh model a recipe starts from. Raises the errors of `load`.

    A tokenizer that was learnt is kept in the run's `folder`: the data it was learnt from may
    change until the run is resumed.
    """
    source = recipe.model
    if source.checkpoint is not None:
        pipe = load(source.checkpoint, dtype=torch.float32, device=device)
        model = _changed(pipe.model, source, recipe.seed)
        return Start(model.train(), pipe.tokenizer, pipe.engine.system_message)
    config = _config(PRESETS.get(source.preset or ""), source)
    kept = folder / "tokenizer"
    if kept.is_dir():
        tokenizer = Tokenizer.from_folder(kept)
    else:
        tokenizer = _tokenizer(recipe)
        kept.mkdir(parents=True)
        tokenizer.save(kept)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )
    return Start(new_model(config, recipe.seed).to(device), tokenizer, source.system_message)


def build_source(data: Sequence[DataRecipe], seed: int) -> Source:
    """One source, or the mixture of several. Raises DataError."""
    sources = [(_source(item), item.weight) for item in data]
    if len(sources) == 1:
        return sources[0][0]
    from neounify.data.mixture import Mixture

    return Mixture(sources, seed)


def build_encoder(stage: StageRecipe, start: Start) -> Encoder:
    return Encoder(
        config=start.model.config,
        tokenizer=start.tokenizer,
        system_message=start.system_message,
        dropout=stage.dropout,
        noise_draws=stage.noise_draws,
        target_pixels=stage.target_pixels,
        target_buckets=stage.target_buckets,
    )


def _source(data: DataRecipe) -> Source:
    if data.kind == "scenes":
        return SceneDataset(
            data.seed,
            scene_config(data.world),
            data.tasks,
            split=data.split,
            side=data.side,
            chinese=data.chinese,
        )
    assert data.path is not None
    if data.kind == "jsonl":
        from neounify.data.jsonl import JsonlSource

        return JsonlSource(Path(data.path), task=data.task, colour_profiles=data.colour_profiles)
    from neounify.data.shards import ShardSource

    pattern = Path(data.path)
    shards = sorted(
        p for p in pattern.parent.glob("*") if fnmatch(p.name.lower(), pattern.name.lower())
    )
    return ShardSource(shards, task=data.task, colour_profiles=data.colour_profiles)


def _changed(model: NeoUnify, source: ModelRecipe, seed: int) -> NeoUnify:
    """A checkpoint's model with the recipe's changes; what they add has fresh weights."""
    if not source.changes:
        # Mapped weights are the file's own pages; training needs memory it may write to.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model.requires_grad_(True)
    changed = new_model(_config(model.config, source), seed).to(model.device)
    old = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name in old and old[name].shape == parameter.shape:
                parameter.copy_(old[name])
    return changed


def _config(base: ModelConfig | None, source: ModelRecipe) -> ModelConfig:
    if base is None:
        raise ConfigError(f"preset {source.preset!r} is unknown; known: {', '.join(PRESETS)}")
    try:
        return base.replace(**source.changes)
    except TypeError as error:
        raise ConfigError(f"model.changes: {error}") from error


def _tokenizer(recipe: Recipe) -> Tokenizer:
    wanted = recipe.model.tokenizer
    made = [item for stage in recipe.stages for item in stage.data if item.kind == "scenes"]
    if not made:
        raise ConfigError("a fresh model learns its tokenizer from made scenes, none are named")
    texts = []
    for item in made[:1]:
        world = SceneDataset(TOKENIZER_SEED, scene_config(item.world), chinese=item.chinese)
        texts += [world[n].text() for n in range(wanted.samples)]
    return byte_tokenizer(texts, wanted.vocab_size)
