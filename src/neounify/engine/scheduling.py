"""Scheduling of images into denoising steps. Numbers only, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Waiting:
    """An image in progress: tokens of its next step over all branches, steps left, steps missed."""

    rows: int
    steps_left: int
    missed: int = 0


def select_images(waiting: Sequence[Waiting], max_rows: int, max_missed: int) -> list[int]:
    """Indices in `waiting` of the images of the next step.

    Shortest remaining work first; but images that missed `max_missed` steps go before all others,
    the longest waiting first. At most `max_rows` tokens take part, or one image that alone has
    more. Updates `missed` of all.
    """

    def urgency(index: int) -> tuple[bool, int, int, int]:
        item = waiting[index]
        late = item.missed >= max_missed
        return not late, -item.missed if late else 0, item.steps_left * item.rows, index

    chosen: list[int] = []
    rows = 0
    for index in sorted(range(len(waiting)), key=urgency):
        if not chosen or rows + waiting[index].rows <= max_rows:
            chosen.append(index)
            rows += waiting[index].rows
    selected = set(chosen)
    for index, item in enumerate(waiting):
        item.missed = 0 if index in selected else item.missed + 1
    return chosen


def preview_steps(steps: int, previews: int | None) -> frozenset[int]:
    """Steps of 1..`steps` - 1 after which a preview is sent, evenly spread.

    None stands for all steps, the last one included.
    """
    if previews is None:
        return frozenset(range(1, steps + 1))
    wanted = (round(steps * (n + 1) / (previews + 1)) for n in range(previews))
    return frozenset(step for step in wanted if 0 < step < steps)
