"""Divergence: a loss that stays far above the level it had reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from neounify.train.recipe import StageRecipe

LOSSES = ("text/loss", "image/loss")
SMOOTHING = 0.7
"""Weight of the past in the running loss; one noisy report alone does not raise it far."""
FACTOR = 3.0
"""How far above its lowest level the running loss must stand."""
REPORTS = 5
"""Reports in a row for which it must."""
LEAST = 0.02
"""Levels below count as this much: a loss near zero triples by chance."""


@dataclass
class _Level:
    running: float
    lowest: float
    at_step: int
    above: int = 0
    said: bool = False


@dataclass
class DivergenceWatch:
    """Follows the losses of the reports of one stage; a warning once per rise."""

    levels: dict[str, _Level] = field(default_factory=dict)

    def look(self, step: int, metrics: Mapping[str, float], stage: StageRecipe) -> str | None:
        """What to say after the report of a step; None as long as all is well."""
        for name in LOSSES:
            if name not in metrics:
                continue
            value = metrics[name]
            level = self.levels.setdefault(name, _Level(value, value, step))
            level.running = SMOOTHING * level.running + (1 - SMOOTHING) * value
            if level.running <= level.lowest:
                level.lowest, level.at_step = level.running, step
            if level.running <= FACTOR * max(LEAST, level.lowest):
                level.above, level.said = 0, False
                continue
            level.above += 1
            if level.above >= REPORTS and not level.said:
                level.said = True
                return _warning(name.partition("/")[0], level, stage)
        return None


def _warning(kind: str, level: _Level, stage: StageRecipe) -> str:
    return (
        f"training diverges: the {kind} loss has been above {FACTOR:g} times its level for "
        f"{level.above} reports ({level.running:.3g} now, {level.lowest:.3g} at step "
        f"{level.at_step:,}). {settings_against_divergence(stage)} Then start again, or resume "
        "from a state of before (--resume DIR)"
    )


def settings_against_divergence(stage: StageRecipe) -> str:
    """The settings that calm a stage, with their values."""
    precision = ', use precision = "float32"' if stage.precision != "float32" else ""
    return (
        f"Lower optimizer.learning_rate ({stage.optimizer.learning_rate:g}) or clip "
        f"({stage.clip:g}), or raise schedule.warmup ({stage.schedule.warmup}){precision}."
    )
