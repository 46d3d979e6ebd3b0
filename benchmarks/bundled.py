"""How long the bundled model takes for one image and one answer, on one core."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import neounify
from benchmarks.figure import Figure
from benchmarks.timing import median_seconds
from neounify.bundled import bundled_model

PAINT_AIM, ANSWER_AIM = 2.0, 0.3
STEPS = 40


def figures(dtype: torch.dtype) -> Iterator[Figure]:
    """Guided image generation at 40 steps, and a question about the image."""
    with _one_thread():
        pipe = neounify.load(bundled_model(), dtype=dtype)
        image = pipe.generate("a red circle above a blue square", steps=STEPS).images[0]
        for name, call, aim in (
            ("an image at 40 steps", lambda: pipe.generate("a green star", steps=STEPS), PAINT_AIM),
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


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
