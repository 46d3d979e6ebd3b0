"""The plan of a training run: memory of each of its stages on every device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from neounify.cli.command import CliError
from neounify.cli.display import Display
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    from neounify.config import ModelConfig
    from neounify.train.memory import StageMemory
    from neounify.train.recipe import Recipe


def plan_training(
    file: Path, gpus: int, preset: str | None, device: float, display: Display
) -> None:
    """Print the memory of each stage of a recipe on so many devices of `device` bytes.

    Raises Exit 1 if a stage does not fit, and the errors of recipes.
    """
    with lasting_imports():
        from neounify.train.memory import stage_memory
        from neounify.train.parallel import check_model, check_parallel
        from neounify.train.recipe import read_recipe

    with display.deprecations():
        recipe = read_recipe(file)
    shape = check_parallel(recipe, gpus)
    config = _config(recipe, preset)
    check_model(config, shape)
    display.say(f"{shape}; GB on each device of {device / 1e9:g}")
    display.say(HEADER)
    stages, fits = [], True
    for stage in recipe.stages:
        if not stage.method.shards:
            display.say(f"{stage.name:<20} {stage.method.kind}: every device has the whole model")
            continue
        memory = stage_memory(config, stage, shape)
        cuts = memory.fitting(device)
        least = None if cuts is None else -(-cuts // (shape.cuts // shape.shard))
        good = least is not None and least <= shape.shard
        fits = fits and good
        display.say(_line(stage.name, memory, shape.cuts) + ("" if good else _advice(least)))
        stages.append({"stage": stage.name, **asdict(memory), "least_shard": least, "fits": good})
    display.emit({**asdict(shape), "stages": stages})
    if not fits:
        raise typer.Exit(1)


COLUMNS = ("trained B", "frozen B", "states", "unit", "root", "inputs", "layer", "sum")
HEADER = f"{'stage':<20}" + "".join(f"{name:>11}" for name in COLUMNS)


def _line(name: str, memory: StageMemory, cuts: int) -> str:
    states = memory.states / cuts + memory.adapters
    bytes_of = (states, memory.unit, memory.root, memory.inputs, memory.layer)
    values = (memory.trained, memory.frozen, *bytes_of, memory.on(cuts))
    return f"{name:<20}" + "".join(f"{value / 1e9:>11.1f}" for value in values)


def _advice(least: int | None) -> str:
    if least is None:
        return "  does not fit on any number: lower tokens_per_pack or set checkpoint_activations"
    return f"  does not fit: shard must be at least {least}"


def _config(recipe: Recipe, preset: str | None) -> ModelConfig:
    """The model that a recipe trains, or a preset."""
    from neounify.config.presets import PRESETS
    from neounify.train.setup import recipe_config

    checkpoint = recipe.model.checkpoint
    if preset is None and checkpoint is not None and not checkpoint.is_dir():
        raise CliError(f"there is no checkpoint {checkpoint}: name its model by --preset")
    return PRESETS[preset] if preset else recipe_config(recipe)
