"""Prefixes that noisy images look at, side by side, so that one product serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.cache.contiguous import SequenceCache
from neounify.cache.paged import Padded


class PrefixBatch:
    """A copy of B prefixes, with room for an image of up to `longest` tokens before each.

    The prefixes are copied once and serve all denoising steps, which write their own keys
    and values over those of the step before.
    """

    def __init__(self, caches: Sequence[SequenceCache], lengths: Sequence[int]) -> None:
        """`lengths` are the tokens of the images."""
        layers, heads, _, d = caches[0].keys.shape
        device = caches[0].keys.device
        self.longest = max(lengths)
        width = self.longest + max(cache.length for cache in caches)
        shape = (layers, len(caches) * width, heads, d)
        self._keys, self._values = (caches[0].keys.new_zeros(shape) for _ in range(2))
        mask = torch.zeros(len(caches), width, dtype=torch.bool)
        for number, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            first = number * width + self.longest
            places = slice(first, first + cache.length)
            for own, kept in ((self._keys, cache.keys), (self._values, cache.values)):
                own[:, places] = kept[:, :, : cache.length].transpose(1, 2)
            mask[number, :length] = True
            mask[number, self.longest : self.longest + cache.length] = True
        self._mask = mask.to(device)
        self.slots = _slots(lengths, self.longest).to(device)
        self._places = _slots(lengths, width).to(device)

    def with_images(
        self, layer: int, k: Float[Tensor, "g kv d"], v: Float[Tensor, "g kv d"]
    ) -> Padded:
        """What each image sees: itself and its prefix."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._places, k)
        values.index_copy_(0, self._places, v)
        k, v = (x.unflatten(0, self._mask.shape).transpose(1, 2) for x in (keys, values))
        return Padded(k, v, self._mask)


def _slots(lengths: Sequence[int], width: int) -> Tensor:
    return torch.cat([torch.arange(n) + number * width for number, n in enumerate(lengths)])
