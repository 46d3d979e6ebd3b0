"""Divergence: a loss that stays far above the level it had reached."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from neounify.train.recipe import StageRecipe

LOSSES = ("text/loss", "image/loss")
WINDOW = 5
"""Reports whose median is the running loss: single spikes do not count."""
FACTOR = 3.0
"""Running loss over its lowest level from which on it counts as high."""
REPORTS = 5
"""Reports in a row with a high loss that are reported as divergence."""
MIN_LEVEL = 0.02
"""Lower levels count as this: a loss near zero triples by chance."""


@dataclass
class _Level:
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    running: float = math.inf
    lowest: float = math.inf
    at_step: int = 0
    above: int = 0

    def add(self, step: int, value: float) -> None:
        self.recent.append(value)
        self.running = median(self.recent)
        if self.running <= self.lowest:
            self.lowest, self.at_step = self.running, step
        high = self.running > FACTOR * max(MIN_LEVEL, self.lowest)
        self.above = self.above + 1 if high else 0


@dataclass
class DivergenceWatch:
    """Follows the losses of the reports of one stage; a warning once per rise."""

    levels: dict[str, _Level] = field(default_factory=dict)

    def look(self, step: int, metrics: Mapping[str, float], stage: StageRecipe) -> str | None:
        """What to say after the report of a step; None as long as all is well."""
        for name in LOSSES:
            if name not in metrics:
                continue
            level = self.levels.setdefault(name, _Level())
            level.add(step, metrics[name])
            if level.above == REPORTS:
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
