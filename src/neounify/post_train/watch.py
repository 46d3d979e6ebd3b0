"""Watch over rewards: known failures of reinforcement learning in plain words, and collapse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

START_ITERATIONS = 3
"""Iterations whose mean reward is the start that later ones are compared with."""
MEMORY = 0.8
"""Share of the running means of rewards that an iteration leaves as it was."""
RISE, FALL = 0.03, 0.08
"""Changes of a mean reward in [0, 1] that are called a rise and a fall."""
MAX_EQUAL = 0.8
BY = "reward/by/"


@dataclass
class RewardWatch:
    """Running means of the reward and of each category's, since the start of the stage."""

    start: dict[str, float] = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)
    iterations: int = 0
    best: float = 0.0
    best_step: int = 0
    """The step at which the running mean of the reward was last near its best."""

    def add(self, rewards: Mapping[str, float], step: int) -> None:
        """Count an iteration's means, `reward` and `reward/by/CATEGORY`, at a step of the run."""
        for name, value in rewards.items():
            if self.iterations < START_ITERATIONS or name not in self.start:
                seen = min(self.iterations, START_ITERATIONS - 1)
                before = self.start.get(name, value)
                self.start[name] = self.mean[name] = (before * seen + value) / (seen + 1)
            else:
                self.mean[name] = MEMORY * self.mean[name] + (1 - MEMORY) * value
        self.iterations += 1
        reward = self.mean.get("reward", 0.0)
        self.best = max(self.best, reward)
        if reward >= 0.95 * self.best:
            self.best_step = step

    def has_collapsed(self, floor: float) -> bool:
        """Whether the running mean of the reward is below `floor` times its best."""
        reward = self.mean.get("reward", 0.0)
        return self.iterations > START_ITERATIONS and reward < floor * self.best

    def warnings(self, report: Mapping[str, float]) -> list[str]:
        """Problems of the run, each with the setting to change."""
        messages = []
        change = {name: self.mean[name] - self.start[name] for name in self.mean}
        fallen = sorted(n for n, c in change.items() if n.startswith(BY) and c < -FALL)
        if change.get("reward", 0.0) > RISE and fallen:
            falls = ", ".join(
                f"{n.removeprefix(BY)} {self.start[n]:.2f} to {self.mean[n]:.2f}" for n in fallen
            )
            messages.append(
                f"the reward rises while {falls} falls: the reward does not hold these up. Give "
                "their prompts a larger share (prompts.categories), or raise method.kl"
            )
        if report.get("equal", 0.0) > MAX_EQUAL:
            messages.append(
                f"{report['equal']:.0%} of the groups have equal rewards and teach nothing: "
                "draw harder or easier prompts (prompts.categories), further ones "
                "(method.max_draws), a larger method.group, or more noise of images (method.eta)"
            )
        return messages

    def to_json(self) -> dict[str, Any]:
        """The state for a resume."""
        return {
            "start": dict(self.start),
            "mean": dict(self.mean),
            "iterations": self.iterations,
            "best": self.best,
            "best_step": self.best_step,
        }

    @classmethod
    def from_json(cls, value: Any) -> RewardWatch:
        """The watch of a saved state; a new one for anything else. Raises ValueError."""
        if not isinstance(value, Mapping) or set(value) != set(cls().to_json()):
            raise ValueError("no state of a reward watch")
        return cls(**value)


def state_before(names: Sequence[str], step: int) -> str | None:
    """The newest of some saved states, `step-00001000`, that is not after a step."""
    numbers = sorted((int(name.removeprefix("step-")), name) for name in names)
    before = [name for number, name in numbers if number <= step]
    return before[-1] if before else None
