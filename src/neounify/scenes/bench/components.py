"""Connected components of a binary picture, by runs of each row and union-find."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Label the 8-connected parts of a mask: labels [h, w], 0 outside, and how many there are.

    Labels run from 1 in reading order of each part's first pixel.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 1), np.int8)
    padded[:, :width] = mask
    steps = np.diff(padded.ravel(), prepend=np.int8(0))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    rows = starts // (width + 1)
    first, last = (starts % (width + 1)).tolist(), ((ends - 1) % (width + 1)).tolist()
    parent = list(range(len(first)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    bounds = np.searchsorted(rows, np.arange(height + 1)).tolist()
    for row in range(1, height):
        above, above_end = bounds[row - 1], bounds[row]
        here, here_end = bounds[row], bounds[row + 1]
        while above < above_end and here < here_end:
            if first[above] <= last[here] + 1 and first[here] <= last[above] + 1:
                a, b = root(above), root(here)
                parent[max(a, b)] = min(a, b)
            if last[above] < last[here]:
                above += 1
            else:
                here += 1

    labels = np.zeros((height, width), np.int32)
    number: dict[int, int] = {}
    for run, row in enumerate(rows.tolist()):
        label = number.setdefault(root(run), len(number) + 1)
        labels[row, first[run] : last[run] + 1] = label
    return labels, len(number)
