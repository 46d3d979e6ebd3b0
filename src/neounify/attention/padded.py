"""Many short documents without caches: one row per document, padded to the longest.

Training packs hundreds of short documents into a call. Attention block by block would
spend its time on the calls; padded, one masked product serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from neounify.attention.plan import Caches, masked_attention
from neounify.model.layout import Block, Layout
from neounify.model.parts import STREAMS, UND, StreamName
from neounify.model.stream import Projected

MAX_LENGTH = 512
"""Longer documents have blocks long enough to be worth a call each."""
MAX_PADDING = 3.0
"""Padded rows per row, at most."""


class PaddedAttention:
    """One masked product for all documents.

    The tokens of each document lie behind one another, stream by stream, in one of `documents`
    rows of `longest` places. `slots` is the place of each token of a stream, `mask` [documents,
    longest, longest] who sees whom. Empty places see themselves only, so that every softmax has
    something to add up.
    """

    def __init__(self, layout: Layout, longest: int, device: torch.device) -> None:
        mask = np.tile(np.eye(longest, dtype=bool), (len(layout.documents), 1, 1))
        firsts = np.arange(len(layout.documents)) * longest
        self._slots: dict[StreamName, Tensor] = {}
        with torch.inference_mode(False):
            for name in STREAMS:
                rows = layout[name]
                slots = np.concatenate(
                    [
                        firsts[number] + np.arange(stop - start)
                        for number, (start, stop) in enumerate(rows.ranges)
                    ]
                )
                firsts = firsts + np.array([stop - start for start, stop in rows.ranges])
                for block in rows.blocks:
                    _mark(mask, block, slots[block.start] % longest, STREAMS[name].context)
                self._slots[name] = torch.from_numpy(slots).to(device)
            self._mask = torch.from_numpy(mask).to(device).unsqueeze(1)

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PaddedAttention | None:
        if caches is not None:
            return None
        ranges = zip(*(layout[name].ranges for name in STREAMS), strict=True)
        lengths = [sum(stop - start for start, stop in document) for document in ranges]
        longest, total = max(lengths, default=0), sum(lengths)
        few = len(lengths) < 2 or longest > MAX_LENGTH
        if few or len(lengths) * longest > MAX_PADDING * total:
            return None
        return cls(layout, longest, device)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        slots = [self._slots[name] for name in streams]
        index = slots[0] if len(slots) == 1 else torch.cat(slots)
        documents, longest = self._mask.shape[0], self._mask.shape[-1]

        def side_by_side(rows: Sequence[Tensor]) -> Tensor:
            x = rows[0] if len(rows) == 1 else torch.cat(list(rows))
            padded = x.new_zeros(documents * longest, *x.shape[1:]).index_copy(0, index, x)
            return padded.unflatten(0, (documents, longest)).transpose(1, 2)

        q, k, v = (side_by_side(parts) for parts in zip(*streams.values(), strict=True))
        out = masked_attention(q, k, v, self._mask)
        rows = out.transpose(1, 2).flatten(0, 1)[index].split([s.shape[0] for s in slots])
        attended = dict(zip(streams, rows, strict=True))
        if UND in streams and not any(x.requires_grad for x in streams[UND]):
            # Nothing that the context sees is trained; it only shared a product with the others.
            attended[UND] = attended[UND].detach()
        return attended


def _mark(mask: np.ndarray, block: Block, first: int, context: bool) -> None:
    """Let the queries of a block, the first of them at place `first`, see their keys."""
    own = mask[block.document, first : first + block.length]
    if block.causal:
        before = block.visible - block.length
        own[:, : block.visible] = np.tri(block.length, block.visible, before, dtype=bool)
    else:
        own[:, : block.visible] = True
    if not context:
        own[:, first : first + block.length] = True
