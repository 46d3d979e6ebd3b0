"""Attention of short documents side by side: training without caches, and masked products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neounify.attention.blocks import Caches
from neounify.model.layout import Block, Layout, to_device
from neounify.model.parts import STREAMS, StreamName
from neounify.model.stream import Projected

MAX_DOCUMENT = 512
"""Longer documents are padded only where their blocks are short."""
MAX_SHORT_DOCUMENT, SHORT_BLOCK = 2048, 64
"""Tokens of a document whose blocks have fewer tokens than that on average: clips frame by frame,
say, whose blocks are not worth a call each (docs/log.md)."""


class PaddedAttention:
    """A few masked products for all documents, one for those of similar length.

    Training packs hundreds of short documents into a call. Attention block by block would spend its
    time on the calls; padded to the longest of its group, one masked product serves many.

    The tokens of each document are concatenated, stream by stream, in slots of that one; `slots`
    is the slot of each token of a stream. A group has `documents` rows of `longest` slots and a
    mask [documents, 1, longest, longest], True where a query sees a key. Empty slots see only
    themselves, so that no row of the softmax is empty.
    """

    def __init__(self, layout: Layout, lengths: Sequence[int], device: torch.device) -> None:
        places: dict[int, tuple[np.ndarray, int]] = {}
        masks: list[np.ndarray] = []
        firsts = np.zeros(len(lengths), dtype=np.int64)
        size = 0
        for group in by_length(lengths):
            longest = lengths[group[0]]
            mask = np.tile(np.eye(longest, dtype=bool), (len(group), 1, 1))
            masks.append(mask)
            for row, number in enumerate(group):
                places[number], firsts[number] = (mask[row], size), size
                size += longest
        self._size, self._slots = size, dict[StreamName, np.ndarray]()
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
                mask, first = places[block.document]
                _mark(mask, block, slots[block.start] - first, STREAMS[name].context)
            self._slots[name] = slots
        self._indices: dict[tuple[StreamName, ...], Tensor] = {}
        with torch.inference_mode(False):
            self._masks = [to_device(mask, device).unsqueeze(1) for mask in masks]

    def _index(self, streams: tuple[StreamName, ...]) -> Tensor:
        """The place of each token of these streams, made once."""
        if streams not in self._indices:
            slots = np.concatenate([self._slots[name] for name in streams])
            with torch.inference_mode(False):
                self._indices[streams] = to_device(slots, self._masks[0].device)
        return self._indices[streams]

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PaddedAttention | None:
        if caches is not None:
            return None
        ranges = zip(*(layout[name].ranges for name in STREAMS), strict=True)
        lengths = [sum(stop - start for start, stop in document) for document in ranges]
        blocks = sum(len(layout[name].blocks) for name in STREAMS)
        most = MAX_SHORT_DOCUMENT if sum(lengths) < SHORT_BLOCK * blocks else MAX_DOCUMENT
        if len(lengths) < 2 or max(lengths) > most:
            return None
        return cls(layout, lengths, device)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        index = self._index(tuple(streams))
        sizes = [mask.shape[0] * mask.shape[-1] for mask in self._masks]

        def side_by_side(rows: Sequence[Tensor]) -> list[Tensor]:
            x = rows[0] if len(rows) == 1 else torch.cat(list(rows))
            padded = x.new_zeros(self._size, *x.shape[1:]).index_copy(0, index, x)
            return [
                part.unflatten(0, (mask.shape[0], mask.shape[-1])).transpose(1, 2)
                for mask, part in zip(self._masks, padded.split(sizes), strict=True)
            ]

        q, k, v = (side_by_side(parts) for parts in zip(*streams.values(), strict=True))
        groups = map(masked_attention, q, k, v, self._masks)
        out = torch.cat([group.transpose(1, 2).flatten(0, 1) for group in groups])
        lengths = [x.q.shape[0] for x in streams.values()]
        attended = dict(zip(streams, out.index_select(0, index).split(lengths), strict=True))
        for name, x in streams.items():
            if STREAMS[name].context and not any(tensor.requires_grad for tensor in x):
                # Nothing that the context sees is trained; it only shared a product with others.
                attended[name] = attended[name].detach()
        return attended


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of documents in groups, the longest first, none below half of its group's longest."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if not groups or 2 * lengths[number] < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(number)
    return groups


def _mark(mask: np.ndarray, block: Block, first: int, context: bool) -> None:
    """Let the queries of a block, the first of them in slot `first`, see their keys."""
    block_mask = mask[first : first + block.length]
    if block.causal:
        before = block.visible - block.length
        block_mask[:, : block.visible] = np.tri(block.length, block.visible, before, dtype=bool)
    else:
        block_mask[:, : block.visible] = True
    if not context:
        block_mask[:, first : first + block.length] = True


def masked_attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b kv m d"],
    v: Float[Tensor, "b kv m d"],
    mask: Bool[Tensor, "b 1 _n m"],
) -> Float[Tensor, "b heads n d"]:
    """Attention of padded documents under a mask.

    In half precision on a CPU the scores are rounded to that precision before the softmax, which
    itself is float32: at a score of 11 bfloat16 rounds by up to 1/32, 3 % of a weight. Outputs
    are then off by up to three times what the library's kernels are; float32 scores took 1.5 to
    4 times as long (docs/log.md). A test bounds it.
    """
    half = q.dtype.itemsize == 2 or torch.is_autocast_enabled("cpu")
    if q.device.type != "cpu" or not half:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    # In half precision on a CPU the library's masked kernel is slower (docs/log.md).
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    unseen = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return (scores + unseen).softmax(dim=-1) @ v
