"""Image sizes that a recipe trains, recorded in the checkpoint's config."""

from __future__ import annotations

import dataclasses

from neounify.config import ModelConfig
from neounify.image.sizes import fit_size
from neounify.scenes.world import scene_config
from neounify.train.recipe import DataRecipe, Recipe, StageRecipe

_GENERATING = {"t2i", "t2i_think", "edit", "edit_think", "interleave"}

Size = tuple[int, int]


def with_trained_sizes(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The config with the sizes of all stages of a recipe, besides those it already has.

    Buckets and scenes give (width, height) pairs, files of images of any shape a range of areas.
    """
    sampling = config.sampling
    sizes, ranges = list(sampling.trained_sizes), []
    if sampling.trained_pixels is not None:
        ranges.append(sampling.trained_pixels)
    for stage in recipe.stages:
        for data in stage.data:
            found = _sizes_of(stage, data, config)
            if isinstance(found, list):
                sizes += found
            else:
                ranges.append(found)
    sampling = dataclasses.replace(
        sampling,
        trained_sizes=tuple(dict.fromkeys(sizes)),
        trained_pixels=(min(r[0] for r in ranges), max(r[1] for r in ranges)) if ranges else None,
    )
    return config.replace(sampling=sampling)


def _sizes_of(stage: StageRecipe, data: DataRecipe, config: ModelConfig) -> list[Size] | Size:
    """(width, height) pairs, or (least, greatest) area, of the targets of one source."""
    tasks = set(data.tasks or _GENERATING) if data.task is None else {data.task}
    if not _GENERATING & tasks:
        return []
    if stage.target_buckets:
        return list(stage.target_buckets)
    own = (config.sampling.edit_min_pixels, config.sampling.edit_max_pixels)
    low, high = stage.target_pixels or own
    if data.kind != "scenes":
        return low, high
    side = data.side or scene_config(data.world).side
    height, width = fit_size(
        side, side, multiple=config.token_size, min_pixels=low, max_pixels=high
    )
    return [(width, height)]
