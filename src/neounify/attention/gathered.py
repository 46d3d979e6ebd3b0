"""Keys and values of rows that are spread over ranks, and the attention of images spread so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from neounify.attention.blocks import attend_apart
from neounify.cache import Cache
from neounify.model.layout import Layout
from neounify.model.parts import GEN, StreamName
from neounify.model.stream import Projected


def gather_keys(x: Projected, join: Callable[[Tensor], Tensor]) -> Projected:
    """Queries of these rows with the keys and values of all rows, in one exchange.

    `join` makes of a tensor with these rows, [n, 2, heads, d], the one with all of them.
    """
    pairs = torch.stack([x.k, x.v], dim=1)
    if torch.is_autocast_enabled(pairs.device.type):
        # Attention would round them to it anyway.
        pairs = pairs.to(torch.get_autocast_dtype(pairs.device.type))
    k, v = join(pairs).unbind(1)
    return Projected(x.q, k, v)


class SpreadImageAttention:
    """An attention plan for some rows of every image of a layout, which has no other tokens.

    `rows` are the numbers of rows of each image that the queries are of, in order; `join` makes of
    a tensor with these rows the one with all rows of the layout. The cached prefixes are whole.
    """

    def __init__(
        self,
        layout: Layout,
        caches: Sequence[Cache],
        rows: Sequence[int],
        join: Callable[[Tensor], Tensor],
    ) -> None:
        self._blocks, self._caches, self._join = layout[GEN].blocks, caches, join
        self._queries = [slice(*ends) for ends in pairwise(accumulate(rows, initial=0))]

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[GEN]
        whole = gather_keys(x, self._join)
        pieces = []
        for block, queries in zip(self._blocks, self._queries, strict=True):
            if queries.stop > queries.start:
                prefix = self._caches[block.document].read(layer, block.visible)
                pieces.append(attend_apart(whole, block, *prefix, queries))
        return {GEN: torch.cat(pieces) if pieces else x.q}
