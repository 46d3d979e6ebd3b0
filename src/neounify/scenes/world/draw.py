"""Random draws that depend on (seed, index) alone, never on process, platform or worker count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def sample_rng(seed: int, *path: int) -> np.random.Generator:
    """The generator of one draw: a seed and a path of numbers, all at least 0.

    Training samples have paths of length one, evaluation's are longer: they never share a stream.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=path)))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_weighted(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
    """One key, with probability in proportion to its weight."""
    mark = rng.random() * sum(weights.values())
    for option, weight in weights.items():
        mark -= weight
        if mark < 0:
            return option
    return next(option for option in reversed(list(weights)) if weights[option] > 0)


def shuffled(rng: np.random.Generator, options: Sequence[T]) -> list[T]:
    """The options in random order."""
    return [options[i] for i in rng.permutation(len(options))]


def shuffled_by_weight(rng: np.random.Generator, weights: Mapping[T, float]) -> list[T]:
    """All keys, drawn one after the other in proportion to the weights of those that are left.

    Sorting by u^(1/w) does that (Efraimidis and Spirakis 2006).
    """
    marks = {option: float(rng.random()) ** (1 / weight) for option, weight in weights.items()}
    return sorted(weights, key=lambda option: -marks[option])


def chance(rng: np.random.Generator, probability: float) -> bool:
    """True with the given probability, 0 to 1."""
    return bool(rng.random() < probability)
