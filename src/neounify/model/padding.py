"""Many short documents side by side: one row per document, padded to the longest.

Training packs hundreds of short documents into a call. Attention block by block would
spend its time on the calls; padded, one masked product serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neounify.model.block import Block

LONGEST = 512
"""Longer documents have blocks long enough to be worth a call each."""
MOST_PADDING = 3.0
"""Padded rows per row, at most."""


@dataclass(frozen=True)
class Padding:
    """Where each row stands in [documents · longest], and who sees whom there.

    A document's understanding tokens come first, then its generation tokens. Empty
    places see themselves only, so that every softmax has something to add up.
    """

    und_slots: Int[Tensor, " u"]
    gen_slots: Int[Tensor, " g"]
    mask: Bool[Tensor, "documents longest longest"]

    def to(self, device: torch.device) -> Padding:
        return Padding(self.und_slots.to(device), self.gen_slots.to(device), self.mask.to(device))


def make_padding(
    und_ranges: Sequence[tuple[int, int]],
    und_blocks: Sequence[Block],
    gen_blocks: Sequence[Block],
) -> Padding | None:
    """The padding of a layout, or None where it would not pay."""
    und_lengths = [stop - start for start, stop in und_ranges]
    lengths = list(und_lengths)
    for block in gen_blocks:
        lengths[block.document] += block.length
    longest, total = max(lengths, default=0), sum(lengths)
    few = len(lengths) < 2 or longest > LONGEST
    if few or len(lengths) * longest > MOST_PADDING * total:
        return None
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(lengths), 1, 1)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    for block in und_blocks:
        first = block.start - und_ranges[block.document][0]
        rows = slice(first, first + block.length)
        seen = causal[rows, : block.visible] if block.causal else torch.tensor(True)
        mask[block.document, rows, : block.visible] = seen
    und_slots = [
        number * longest + place
        for number, length in enumerate(und_lengths)
        for place in range(length)
    ]
    gen_slots: list[int] = []
    free = list(und_lengths)
    for block in gen_blocks:
        first = free[block.document]
        free[block.document] += block.length
        rows = slice(first, first + block.length)
        mask[block.document, rows, : block.visible] = True
        mask[block.document, rows, rows] = True
        base = block.document * longest + first
        gen_slots += range(base, base + block.length)
    return Padding(
        torch.tensor(und_slots, dtype=torch.int64),
        torch.tensor(gen_slots, dtype=torch.int64),
        mask,
    )
