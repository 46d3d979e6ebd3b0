"""Noisy images behind cached prefixes, side by side, so that one product serves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from neounify.attention.plan import Caches, masked_attention
from neounify.cache.contiguous import SequenceCache
from neounify.model.layout import Layout
from neounify.model.parts import GEN, UND, StreamName
from neounify.model.stream import Projected

MAX_LENGTH = 512
"""An image that sees at most so many tokens, its own included, is read side by side with others;
measured in docs/log.md."""


class PrefixAttention:
    """A copy of B prefixes, with room for an image of up to `longest` tokens before each.

    The prefixes are copied once and serve all denoising steps, which write their own keys
    and values over those of the step before.
    """

    def __init__(self, caches: Sequence[SequenceCache], lengths: Sequence[int]) -> None:
        """`lengths` are the tokens of the images."""
        layers, heads, _, d = caches[0].keys.shape
        device = caches[0].keys.device
        longest = max(lengths)
        width = longest + max(cache.length for cache in caches)
        keys = caches[0].keys.new_zeros(layers, len(caches) * width, heads, d)
        values = torch.zeros_like(keys)
        mask = np.zeros((len(caches), width), dtype=bool)
        for number, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            first = number * width + longest
            rows = slice(first, first + cache.length)
            keys[:, rows] = cache.keys[:, :, : cache.length].transpose(1, 2)
            values[:, rows] = cache.values[:, :, : cache.length].transpose(1, 2)
            mask[number, :length] = mask[number, longest : longest + cache.length] = True
        self._keys, self._values = keys.unbind(0), values.unbind(0)
        self._shape, self._longest = (len(caches), width), longest
        self._mask = torch.from_numpy(mask).to(device)[:, None, None]
        self._queries = torch.from_numpy(_slots(lengths, longest)).to(device)
        self._images = torch.from_numpy(_slots(lengths, width)).to(device)

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PrefixAttention | None:
        prefixes = [cache for cache in caches or () if isinstance(cache, SequenceCache)]
        images = layout[GEN]
        if not prefixes or len(prefixes) < len(layout.documents) or layout[UND].length:
            return None
        if [block.document for block in images.blocks] != list(range(len(prefixes))):
            return None
        if max(block.length + block.visible for block in images.blocks) > MAX_LENGTH:
            return None
        return cls(prefixes, [block.length for block in images.blocks])

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x, (images, _) = streams[GEN], self._shape
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._images, x.k)
        values.index_copy_(0, self._images, x.v)
        k, v = (memory.unflatten(0, self._shape).transpose(1, 2) for memory in (keys, values))
        padded = x.q.new_zeros(images * self._longest, *x.q.shape[1:])
        q = padded.index_copy_(0, self._queries, x.q).unflatten(0, (images, -1)).transpose(1, 2)
        out = masked_attention(q, k, v, self._mask)
        return {GEN: out.transpose(1, 2).flatten(0, 1).index_select(0, self._queries)}


def _slots(lengths: Sequence[int], width: int) -> Int64[np.ndarray, " n"]:
    """Where each token of some images stands, `width` places apart."""
    return np.concatenate([np.arange(n) + number * width for number, n in enumerate(lengths)])
