"""Rates of success with 95 % confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from neounify.errors import RequestError

_Z95 = 1.959963984540054  # the normal quantile of 97.5 %


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate, both ends 0 to 1."""
    if not 0 <= successes <= trials or trials == 0:
        raise RequestError(f"no rate of {successes} in {trials}")
    rate, z2 = successes / trials, _Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Rate:
    """How often something was right."""

    correct: int
    number: int

    @property
    def value(self) -> float:
        """The share that was right, 0 to 1."""
        return self.correct / self.number

    def to_json(self) -> dict[str, float | int]:
        """Share, 95 % interval and counts."""
        low, high = wilson_interval(self.correct, self.number)
        return {
            "rate": round(self.value, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "correct": self.correct,
            "n": self.number,
        }

    def __str__(self) -> str:
        low, high = wilson_interval(self.correct, self.number)
        return f"{100 * self.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"
