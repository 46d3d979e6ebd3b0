"""Attention of short documents side by side: training without caches, and masked products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neounify.attention.blocks import Caches
from neounify.model.layout import Block, Layout, to_device
from neounify.model.parts import STREAMS, UND, StreamName
from neounify.model.stream import Projected

MAX_DOCUMENT = 512
"""Longer documents are padded only where their blocks are short."""
MAX_SHORT_DOCUMENT, SHORT_BLOCK = 2048, 64
"""Tokens of a document whose blocks have fewer tokens than that on average: clips frame by frame,
say, whose blocks are not worth a call each (docs/log.md)."""


class PaddedAttention:
    """A few masked products for all documents, one for those of similar size.

    Training packs hundreds of short documents into a call. Attention block by block would spend its
    time on the calls; padded to the largest of its group, one masked product serves many. The
    context of a document is one part of such a product, and so are the blocks of another stream
    that see the same context, as the noisy copies of an image do.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._groups: dict[StreamName, list[_Group]] = {}
        self._places: dict[StreamName, Tensor] = {}
        for name in STREAMS:
            rows = layout[name].length
            first = 0 if STREAMS[name].context else layout[UND].length
            parts = list(_parts(layout, name, first))
            places, size, groups = np.zeros(rows, dtype=np.int64), 0, []
            for numbers in by_size([part.mask.shape for part in parts]):
                group = _Group.of([parts[number] for number in numbers], rows, first + rows, device)
                width = group.mask.shape[2]
                for row, number in enumerate(numbers):
                    queries = parts[number].queries
                    places[queries] = size + row * width + np.arange(len(queries))
                size += len(numbers) * width
                groups.append(group)
            self._groups[name] = groups
            with torch.inference_mode(False):
                self._places[name] = to_device(places, device)

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PaddedAttention | None:
        if caches is not None:
            return None
        ranges = zip(*(layout[name].ranges for name in STREAMS), strict=True)
        lengths = [sum(stop - start for start, stop in document) for document in ranges]
        blocks = sum(len(layout[name].blocks) for name in STREAMS)
        short = sum(lengths) < SHORT_BLOCK * blocks
        few = (blocks if short else len(lengths)) < 2
        most = MAX_SHORT_DOCUMENT if short else MAX_DOCUMENT
        if few or max(lengths) > most:
            return None
        return cls(layout, device)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        return {name: self._attend(name, streams) for name in streams}

    def _attend(self, name: StreamName, streams: Mapping[StreamName, Projected]) -> Tensor:
        if not self._groups[name]:
            return streams[name].q
        both = [name] if STREAMS[name].context else [UND, name]
        seen = [streams[other] for other in both if other in streams]
        q, k, v = (
            torch.cat([*tensors, tensors[0].new_zeros(1, *tensors[0].shape[1:])])
            for tensors in ([streams[name].q], [x.k for x in seen], [x.v for x in seen])
        )
        out = [group.attend(q, k, v) for group in self._groups[name]]
        return torch.cat(out).index_select(0, self._places[name])


class _Part(NamedTuple):
    """Queries of a stream, the tokens that they may see, and which see which.

    `queries` are rows of the stream; `keys` are those of all streams that it sees, one behind the
    other; `mask` [queries, keys].
    """

    queries: Int64[np.ndarray, " n"]
    keys: Int64[np.ndarray, " m"]
    mask: Bool[np.ndarray, "n m"]


@dataclass(frozen=True, eq=False)
class _Group:
    """Parts side by side, filled up to the most queries and keys with rows of zeros.

    Places without a query see their first key, so that no row of the softmax is empty.
    """

    queries: Int64[Tensor, " b_n"]
    keys: Int64[Tensor, " b_m"]
    mask: Bool[Tensor, "b 1 n m"]

    @classmethod
    def of(
        cls,
        parts: Sequence[_Part],
        empty_query: int,
        empty_key: int,
        device: torch.device,
    ) -> _Group:
        """The parts with `empty_query` and `empty_key` as the rows of zeros."""
        n, m = (max(part.mask.shape[side] for part in parts) for side in (0, 1))
        queries = np.full((len(parts), n), empty_query)
        keys = np.full((len(parts), m), empty_key)
        mask = np.zeros((len(parts), 1, n, m), dtype=bool)
        for row, part in enumerate(parts):
            count, seen = part.mask.shape
            queries[row, :count], keys[row, :seen] = part.queries, part.keys
            mask[row, 0, :count, :seen] = part.mask
            mask[row, 0, count:, 0] = True
        with torch.inference_mode(False):
            return cls(
                to_device(queries.reshape(-1), device),
                to_device(keys.reshape(-1), device),
                to_device(mask, device),
            )

    def attend(
        self,
        q: Float[Tensor, "_q heads d"],
        k: Float[Tensor, "_k kv d"],
        v: Float[Tensor, "_k kv d"],
    ) -> Float[Tensor, "b_n heads d"]:
        """Attention of the queries, in the order of their places."""
        number, _, n, m = self.mask.shape

        def side_by_side(x: Tensor, rows: Tensor, width: int) -> Tensor:
            return x.index_select(0, rows).unflatten(0, (number, width)).transpose(1, 2)

        out = masked_attention(
            side_by_side(q, self.queries, n),
            side_by_side(k, self.keys, m),
            side_by_side(v, self.keys, m),
            self.mask,
        )
        return out.transpose(1, 2).flatten(0, 1)


def _parts(layout: Layout, name: StreamName, first: int) -> Iterator[_Part]:
    """The parts of a stream whose keys are counted from `first`: see `PaddedAttention`."""
    starts = [start for start, _ in layout[UND].ranges]
    context = STREAMS[name].context

    def together(block: Block) -> tuple[int, int]:
        return block.document, 0 if context else block.visible

    for (document, visible), same in itertools.groupby(layout[name].blocks, key=together):
        blocks = list(same)
        queries = np.arange(blocks[0].start, blocks[-1].stop)
        before = np.arange(starts[document], starts[document] + visible)
        mask = np.zeros((len(queries), visible + len(queries)), dtype=bool)
        mask[:, :visible] = True
        for block in blocks:
            _mark(mask, block, block.start - blocks[0].start, visible, context=context)
        yield _Part(queries, np.concatenate([before, first + queries]), mask)


def _mark(
    mask: Bool[np.ndarray, "n m"], block: Block, start: int, visible: int, *, context: bool
) -> None:
    """Let the queries of a block, those from `start` on, see their keys; `visible` are seen."""
    rows = mask[start : start + block.length]
    if not context:
        rows[:, visible + start : visible + start + block.length] = True
    elif block.causal:
        before = block.visible - block.length
        rows[:, : block.visible] = np.tri(block.length, block.visible, before, dtype=bool)
    else:
        rows[:, : block.visible] = True


def by_size(sizes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Numbers of sizes in groups; of no side is one twice as large as another of its group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(tuple(side.bit_length() for side in size), []).append(number)
    return list(groups.values())


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
