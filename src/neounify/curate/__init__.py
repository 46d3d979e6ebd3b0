"""Curation of training data: stages that measure and drop samples, copies over all sources."""

from neounify.curate.recipe import CurateError, CurateRecipe, read_curate_recipe, recipe_from_table
from neounify.curate.run import Summary, curate

__all__ = [
    "CurateError",
    "CurateRecipe",
    "Summary",
    "curate",
    "read_curate_recipe",
    "recipe_from_table",
]
