"""Which images share the next denoising step. Numbers only, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Waiting:
    """An image under way: tokens of its next step over all branches, steps left, steps missed."""

    rows: int
    steps_left: int
    missed: int = 0


def choose(waiting: Sequence[Waiting], most_rows: int, most_missed: int) -> list[int]:
    """The places in `waiting` of the images that take the next step.

    Those that finish soonest go first, so that results leave early; but whoever has missed
    `most_missed` steps goes before all others, the longest waiting first. At most `most_rows`
    tokens take part, or one image that alone has more. Updates `missed` of all.
    """

    def urgency(place: int) -> tuple[bool, int, int, int]:
        item = waiting[place]
        late = item.missed >= most_missed
        return not late, -item.missed if late else 0, item.steps_left * item.rows, place

    chosen: list[int] = []
    rows = 0
    for place in sorted(range(len(waiting)), key=urgency):
        if not chosen or rows + waiting[place].rows <= most_rows:
            chosen.append(place)
            rows += waiting[place].rows
    taken = set(chosen)
    for place, item in enumerate(waiting):
        item.missed = 0 if place in taken else item.missed + 1
    return chosen


def preview_steps(steps: int, previews: int | None) -> frozenset[int]:
    """After which of the steps 1..`steps` - 1 to send a preview, evenly spread.

    None stands for all steps, the last one included.
    """
    if previews is None:
        return frozenset(range(1, steps + 1))
    wanted = (round(steps * (n + 1) / (previews + 1)) for n in range(previews))
    return frozenset(step for step in wanted if 0 < step < steps)
