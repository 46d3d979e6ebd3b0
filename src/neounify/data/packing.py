"""Packing of many documents into sequences of bounded length, first-fit decreasing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from neounify.data.encode import Encoded, Pixels
from neounify.data.sample import TASKS
from neounify.model.layout import Layout


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins of at most `capacity`, the longest first; the bins hold item numbers.

    First-fit decreasing: at most 11/9 of the fewest bins (Johnson, 1973). Documents of like
    length end up together, which also keeps padded attention short. ValueError for an item
    over the capacity.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"an item of {max(lengths)} tokens does not fit a pack of {capacity}")
    bins: list[list[int]] = []
    free: list[int] = []
    shortest = min(lengths, default=0)
    first_open = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        while first_open < len(bins) and free[first_open] < shortest:
            first_open += 1
        for number in range(first_open, len(bins)):
            if lengths[item] <= free[number]:
                break
        else:
            number = len(bins)
            bins.append([])
            free.append(capacity)
        bins[number].append(item)
        free[number] -= lengths[item]
    return bins


@dataclass(eq=False)
class Pack:
    """Documents of one forward pass, as tensors.

    N text tokens, L labels, I clean and J noisy images; U understanding rows.
    `label_rows` index the understanding rows; `label_tasks` [L] and `target_tasks` [J] are
    indices in `TASKS`. Images are arrays uint8 [height, width, 3] and not tensors: torch sends each
    tensor between processes as an open file, and there can be hundreds.
    """

    layout: Layout
    ids: Tensor
    label_rows: Tensor
    label_ids: Tensor
    label_tasks: Tensor
    images: list[Pixels]
    targets: list[Pixels]
    target_tasks: Tensor
    samples: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of both streams."""
        return self.layout["und"].length + self.layout["gen"].length


def make_pack(documents: Sequence[Encoded]) -> Pack:
    """Join encoded samples into one pack."""
    rows: list[int] = []
    first = 0
    for d in documents:
        rows += [first + row for row in d.label_rows]
        first += d.document.und_length()
    task = [TASKS.index(d.task) for d in documents]
    per_label = [len(d.label_ids) for d in documents]
    per_target = [len(d.targets) for d in documents]
    return Pack(
        layout=Layout(d.document for d in documents),
        ids=torch.tensor([i for d in documents for i in d.ids], dtype=torch.int64),
        label_rows=torch.tensor(rows, dtype=torch.int64),
        label_ids=torch.tensor([i for d in documents for i in d.label_ids], dtype=torch.int64),
        label_tasks=torch.from_numpy(np.repeat(task, per_label)),
        images=[image for d in documents for image in d.images],
        targets=[image for d in documents for image in d.targets],
        target_tasks=torch.from_numpy(np.repeat(task, per_target)),
        samples=[d.sample for d in documents],
    )
