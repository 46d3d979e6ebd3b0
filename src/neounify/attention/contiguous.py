"""Sequences with contiguous caches that take one token each: one product per layer, no gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from neounify.attention.plan import Caches, attend_tokens
from neounify.cache.contiguous import CacheBatch, SequenceCache
from neounify.model.layout import Layout
from neounify.model.parts import UND, StreamName
from neounify.model.stream import Projected

MAX_PADDING = 3.0
"""Padded tokens per token, at most, of caches that are moved into one memory."""


class ContiguousAttention:
    """One new token of every sequence, attending to all before it.

    The caches of several sequences are moved into one memory (`CacheBatch`), which they share from
    then on, so that only the first step and growth copy them.
    """

    def __init__(self, caches: Sequence[SequenceCache]) -> None:
        lengths = [cache.length + 1 for cache in caches]
        longest = max(lengths)
        device = caches[0].keys.device
        self._rows = self._mask = None
        if len(caches) == 1:
            caches[0].reserve(1)
            keys, values = (x.unsqueeze(1) for x in (caches[0].keys, caches[0].values))
            rows = [0]
        else:
            batch = CacheBatch.of(caches, 1)
            keys, values = batch.keys, batch.values
            rows = [cache.row for cache in caches]
            if rows != list(range(keys.shape[1])):
                self._rows = torch.tensor(rows, device=device)
            ends = torch.tensor(lengths, device=device).view(-1, 1, 1, 1)
            self._mask = torch.arange(longest, device=device) < ends
        self._keys = keys[:, :, :, :longest].unbind(0)
        self._values = values[:, :, :, :longest].unbind(0)
        heads = torch.arange(keys.shape[2], device=device)
        self._new = (
            torch.tensor(rows, device=device).unsqueeze(1),
            heads.unsqueeze(0),
            torch.tensor([n - 1 for n in lengths], device=device).unsqueeze(1),
        )

    @classmethod
    def plan(
        cls, layout: Layout, caches: Caches, device: torch.device
    ) -> ContiguousAttention | None:
        own = [cache for cache in caches or () if isinstance(cache, SequenceCache)]
        if not own or len(own) < len(layout.documents) or not layout.is_decode:
            return None
        lengths = [cache.length + 1 for cache in own]
        if len(own) * max(lengths) > MAX_PADDING * sum(lengths):
            return None
        return cls(own)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[UND]
        k, v = self._keys[layer], self._values[layer]
        k.index_put_(self._new, x.k)
        v.index_put_(self._new, x.v)
        if self._rows is not None:
            k, v = k.index_select(0, self._rows), v.index_select(0, self._rows)
        return {UND: attend_tokens(x.q, k, v, self._mask)}
