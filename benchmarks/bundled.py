"""How long the bundled model takes for one image and one answer, on one core."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import neounify
from benchmarks.figure import Figure
from benchmarks.timing import median_seconds
from neounify.bundled import bundled_model
from neounify.runtime import one_thread

PAINT_AIM, ANSWER_AIM = 0.3, 0.3


def figures(dtype: torch.dtype) -> Iterator[Figure]:
    """An image at the model's own steps, and a question about it."""
    with one_thread():
        pipe = neounify.load(bundled_model(), dtype=dtype)
        image = pipe.generate("a red circle above a blue square").images[0]
        for name, call, aim in (
            ("an image", lambda: pipe.generate("a green star"), PAINT_AIM),
            ("an answer", lambda: pipe.chat("What colour is the circle?", [image]), ANSWER_AIM),
        ):
            seconds = median_seconds(call)
            yield Figure(
                name=f"bundled model, one core: {name}",
                dtype=str(dtype).removeprefix("torch."),
                mode="eager",
                value=seconds,
                unit="s",
                aim=f"at most {aim:g} s",
                met=seconds <= aim,
            )
