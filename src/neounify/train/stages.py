"""Where a run stands among its stages, and which of them come next."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from neounify.errors import ConfigError
from neounify.train.recipe import Recipe


@dataclass
class Progress:
    """Where a run stands. `step` counts all stages, `stage_step` the current one.

    `damaged` counts how often a damaged sample was skipped, `damaged_samples` how many different
    ones there were in each stage.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    samples: int = 0
    images: int = 0
    tokens: int = 0
    damaged: int = 0
    damaged_samples: int = 0
    nonfinite: int = 0
    seconds: float = 0.0


def stages_to_run(recipe: Recipe, progress: Progress, only: Collection[str]) -> range:
    """Numbers of the stages to go through, the one the run stands in first.

    All that are left, or up to the last that `only` names. A run that starts from a checkpoint may
    begin with any stage, as if the checkpoint had been through those before; any other needs the
    stages before, and ConfigError says which.
    """
    stages = recipe.stages
    if not only:
        return range(progress.stage, len(stages))
    names = [stage.name for stage in stages]
    if unknown := set(only) - set(names):
        raise ConfigError(f"no stage {', '.join(sorted(unknown))}; the recipe has {names}")
    wanted = sorted(names.index(name) for name in only)
    first, last = wanted[0], wanted[-1]
    here = stages[progress.stage]
    finished = progress.stage_step >= here.steps
    if left_out := [name for name in names[first : last + 1] if name not in only]:
        raise ConfigError(f"between the stages named, {', '.join(left_out)} is left out")
    if last < progress.stage:
        raise ConfigError(f"{names[last]} is trained already; the run stands in {here.name}")
    if not progress.step and recipe.model.checkpoint is not None:
        return range(first, last + 1)
    if first > progress.stage + finished:
        raise ConfigError(
            f"{names[first]} starts from what {names[first - 1]} leaves, and the run has "
            f"{progress.stage_step} of {here.steps} steps of {here.name}. Train that first "
            "(then --resume auto), or name a checkpoint to start from (model.checkpoint)"
        )
    return range(progress.stage, last + 1)
