"""Hooks for tests, loaded by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Images = Sequence[Image.Image | None]


def safety(images: Images, texts: Sequence[str]) -> list[dict[str, float]]:
    """Scores by words of the text."""
    return [
        {
            "violence": 0.9 if "violent" in text else 0.1,
            "minor_nudity": 0.01 if "never" in text else 0.0,
        }
        for text in texts
    ]


class Beauty:
    """Mean red over 25.5: 0 to 10; counts how often it was created in this process."""

    count = 0

    def __init__(self) -> None:
        Beauty.count += 1

    def __call__(self, images: Images, texts: Sequence[str]) -> list[float]:
        return [float(np.asarray(image)[..., 0].mean() / 25.5) for image in images]


def odd(images: Images, texts: Sequence[str]) -> list[float]:
    """Raises, hangs or is no number, by the text; else 0."""
    if any("raise" in text for text in texts):
        raise RuntimeError("the text says so")
    if any("hang" in text for text in texts):
        time.sleep(60)
    return [float("nan") if "nan" in text else 0.0 for text in texts]


def broken(images: Images, texts: Sequence[str]) -> list[float]:
    """Always raises."""
    raise RuntimeError("no weights here")


def match(images: Images, texts: Sequence[str]) -> list[float]:
    """A cosine that the text names."""
    return [float(text.rpartition(" ")[2]) for text in texts]


def vectors(images: Images, texts: Sequence[str]) -> np.ndarray:
    """A vector by the last word."""
    table = {"north": (1.0, 0.0), "nearly": (0.99, 0.1), "east": (0.0, 1.0)}
    return np.array([table[text.rpartition(" ")[2]] for text in texts])


def uneven(images: Images, texts: Sequence[str]) -> list[list[float]]:
    """Vectors as long as the text."""
    return [[1.0] * len(text) for text in texts]


def stubborn(images: Images, texts: Sequence[str]) -> list[float]:
    """Goes on after any error."""
    for _ in range(600):
        try:
            time.sleep(0.1)
        except Exception:
            continue
    return [0.0 for _ in texts]


def dies_once(images: Images, texts: Sequence[str]) -> list[float]:
    """Kills its process where the file that the last word of a text names is not there yet."""
    for text in texts:
        mark = Path(text.rpartition(" ")[2])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return [0.0 for _ in texts]
