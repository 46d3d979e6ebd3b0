"""Attention backends: plans that serve many sequences in one product, and the choice by name.

decoding      `ContiguousAttention`, `PagedAttention`: one new token of every sequence
denoising     `PrefixAttention`: noisy images behind cached prefixes
training      `PaddedAttention` of `neounify.attention.padded`: short documents without caches
paged, packed `PagedVarlen`, `PrefixVarlen` of `neounify.attention.varlen`, chosen by name
anything      `BlockAttention`, the reference (`neounify.attention.blocks`)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neounify.attention.blocks import AttentionPlan, BlockAttention, Caches, attend_apart
from neounify.attention.padded import PaddedAttention, masked_attention
from neounify.attention.varlen import PagedVarlen, PrefixVarlen, check_varlen
from neounify.cache import PagedSequence, SequenceCache
from neounify.cache.key_values import CacheBatch
from neounify.errors import ConfigError
from neounify.model.layout import Block, Layout, to_device
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN, UND, StreamName
from neounify.model.stream import Projected
from neounify.runtime.plan import UNLIMITED

MAX_PADDING = 3.0
"""Padded tokens per token, at most, of caches that are moved into one memory."""
MAX_PREFIX = 512
"""An image that sees at most so many tokens, its own included, is read side by side with others;
measured in docs/log.md."""


class ContiguousAttention:
    """One new token of every sequence, attending to all before it.

    The caches of several sequences are moved into one memory (`CacheBatch`), which they share from
    then on, so that only the first step and growth copy them.
    """

    def __init__(self, caches: Sequence[SequenceCache]) -> None:
        lengths = [cache.length + 1 for cache in caches]
        longest = max(lengths)
        device = caches[0].keys.device
        self._rows = self._mask = self._places = None
        if len(caches) == 1:
            caches[0].reserve(1)
            keys, values = (x.unsqueeze(1) for x in (caches[0].keys, caches[0].values))
            last = longest - 1
            self._places = keys[:, :, :, last].unbind(0), values[:, :, :, last].unbind(0)
        else:
            batch = CacheBatch.of(caches, 1)
            keys, values = batch.keys, batch.values
        self._keys = keys[:, :, :, :longest].unbind(0)
        self._values = values[:, :, :, :longest].unbind(0)
        if len(caches) == 1:
            return
        rows = [cache.row for cache in caches]
        if rows != list(range(keys.shape[1])):
            self._rows = to_device(np.array(rows), device)
        ends = to_device(np.array(lengths), device).view(-1, 1, 1, 1)
        self._mask = torch.arange(longest, device=device) < ends
        heads = torch.arange(keys.shape[2], device=device)
        self._new = (
            to_device(np.array(rows), device).unsqueeze(1),
            heads.unsqueeze(0),
            to_device(np.array(lengths) - 1, device).unsqueeze(1),
        )

    @classmethod
    def plan(
        cls, layout: Layout, caches: Caches, device: torch.device
    ) -> ContiguousAttention | None:
        contiguous = [c for c in caches or () if isinstance(c, SequenceCache) and c.length]
        if not contiguous or len(contiguous) < len(layout.documents) or not layout.is_decode:
            return None
        lengths = [cache.length + 1 for cache in contiguous]
        if len(contiguous) * max(lengths) > MAX_PADDING * sum(lengths):
            return None
        return cls(contiguous)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[UND]
        k, v = self._keys[layer], self._values[layer]
        if self._places is not None:  # writing at indices takes several times as long
            keys, values = self._places
            keys[layer].copy_(x.k)
            values[layer].copy_(x.v)
        else:
            k.index_put_(self._new, x.k)
            v.index_put_(self._new, x.v)
        if self._rows is not None:
            k, v = k.index_select(0, self._rows), v.index_select(0, self._rows)
        return {UND: attend_tokens(x.q, k, v, self._mask)}


class PagedAttention:
    """One new token of every sequence, written to its slot and attending to all before it."""

    def __init__(self, sequences: Sequence[PagedSequence], device: torch.device) -> None:
        pool = sequences[0].pool
        self._keys, self._values = pool.keys.unbind(0), pool.values.unbind(0)
        size = pool.block_size
        lengths = np.array([sequence.length + 1 for sequence in sequences])
        longest = int(lengths.max())
        blocks = pool.blocks_for(longest)
        tables = np.zeros((len(sequences), blocks), dtype=np.int64)
        for table, sequence in zip(tables, sequences, strict=True):
            used = sequence.block_table[:blocks]
            table[: len(used)] = used
        slots = (tables[:, :, None] * size + np.arange(size)).reshape(len(sequences), -1)
        slots, real = slots[:, :longest], np.arange(longest) < lengths[:, None]
        new = slots[np.arange(len(sequences)), lengths - 1]
        # What lies behind a sequence's end is masked, but a weight of 0 times NaN would be NaN.
        padded = np.where(real, slots, pool.zero_slot)
        self._slots = to_device(padded.reshape(-1), device)
        self._new = to_device(new, device)
        self._shape = real.shape
        self._mask = None if real.all() else to_device(real, device)[:, None, None]

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PagedAttention | None:
        sequences = [c for c in caches or () if isinstance(c, PagedSequence) and c.length]
        if not sequences or len(sequences) < len(layout.documents):
            return None
        if not layout.is_decode or len({id(sequence.pool) for sequence in sequences}) > 1:
            return None
        for sequence in sequences:
            sequence.reserve(1)
        return cls(sequences, device)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[UND]
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._new, x.k)
        values.index_copy_(0, self._new, x.v)
        return {UND: attend_slots(x.q, keys, values, self._slots, self._shape, self._mask)}


class PrefixAttention:
    """A copy of B prefixes, with room for an image of up to `longest` tokens before each.

    The prefixes are copied once and serve all denoising steps, which write their own keys and
    values over those of the step before. Where gradients are wanted, they are written into a copy,
    and nothing of the step stays behind. Images that see more than MAX_PREFIX tokens attend block
    by block in the same call; that depends on an image alone, not on its batch.
    """

    def __init__(
        self, layout: Layout, caches: Sequence[SequenceCache], device: torch.device
    ) -> None:
        self._caches = caches
        blocks = layout[GEN].blocks
        short = [block for block in blocks if _is_short(block)]
        self._long = [block for block in blocks if not _is_short(block)]
        rows = np.concatenate([np.arange(block.start, block.stop) for block in short])
        self._rows = to_device(rows, device) if self._long else None
        lengths = [block.length for block in short]
        self._copy([caches[block.document] for block in short], lengths, device)
        self._same = len(set(lengths)) == 1
        self._queries = to_device(_slots(lengths, self._longest), device)
        self._images = to_device(_slots(lengths, self._shape[1]), device)

    def _copy(
        self, caches: Sequence[SequenceCache], lengths: Sequence[int], device: torch.device
    ) -> None:
        """Copy the prefixes; `lengths` are the tokens of the images."""
        layers, heads, _, d = caches[0].keys.shape
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
        self._mask = to_device(mask, device)[:, None, None]

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PrefixAttention | None:
        prefixes = [c for c in caches or () if isinstance(c, SequenceCache) and c.length]
        blocks = layout[GEN].blocks
        if not prefixes or len(prefixes) < len(layout.documents) or layout[UND].length:
            return None
        if [block.document for block in blocks] != list(range(len(prefixes))):
            return None
        return cls(layout, prefixes, device) if any(map(_is_short, blocks)) else None

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[GEN]
        if self._rows is None:
            return {GEN: self._side_by_side(layer, x)}
        short = Projected(*(tensor.index_select(0, self._rows) for tensor in x))
        out = torch.empty_like(x.q)
        out.index_copy_(0, self._rows, self._side_by_side(layer, short))
        for block in self._long:
            k, v = self._caches[block.document].read(layer, block.visible)
            out[block.start : block.stop] = attend_apart(x, block, k, v)
        return {GEN: out}

    def _side_by_side(self, layer: int, x: Projected) -> Tensor:
        (images, _), longest = self._shape, self._longest
        keys, values = self._keys[layer], self._values[layer]
        # Under autocast they may differ from the cached prefixes.
        k, v = x.k.to(keys.dtype), x.v.to(values.dtype)
        if k.requires_grad or v.requires_grad:
            keys = keys.index_copy(0, self._images, k)
            values = values.index_copy(0, self._images, v)
        else:
            keys.index_copy_(0, self._images, k)
            values.index_copy_(0, self._images, v)
        k, v = (memory.unflatten(0, self._shape).transpose(1, 2) for memory in (keys, values))
        q = x.q
        if not self._same:
            q = q.new_zeros(images * longest, *q.shape[1:]).index_copy_(0, self._queries, q)
        q = q.unflatten(0, (images, longest)).transpose(1, 2)
        out = masked_attention(q, k, v, self._mask).transpose(1, 2).flatten(0, 1)
        return out if self._same else out.index_select(0, self._queries)


def _is_short(block: Block) -> bool:
    return block.length + block.visible <= MAX_PREFIX


def _slots(lengths: Sequence[int], width: int) -> Int64[np.ndarray, " n"]:
    """Slot of each image token in a padded batch, with `width` slots per image."""
    return np.concatenate([np.arange(n) + number * width for number, n in enumerate(lengths)])


def attend_tokens(
    q: Float[Tensor, "b heads d"],
    k: Float[Tensor, "b kv n d"],
    v: Float[Tensor, "b kv n d"],
    mask: Bool[Tensor, "b 1 1 n"] | None,
) -> Float[Tensor, "b heads d"]:
    """Attention of one query token per sequence.

    The query heads that share a key head go as rows of one head, so that keys are not repeated.
    """
    heads = q.unflatten(1, (k.shape[1], -1))
    return scaled_dot_product_attention(heads, k, v, attn_mask=mask).flatten(1, 2)


def attend_slots(
    q: Float[Tensor, "b heads d"],
    keys: Float[Tensor, "slots kv d"],
    values: Float[Tensor, "slots kv d"],
    slots: Int64[Tensor, " bn"],
    shape: tuple[int, ...],
    mask: Bool[Tensor, "b 1 1 n"] | None,
) -> Float[Tensor, "b heads d"]:
    """`attend_tokens` of keys gathered from the `slots` of a pool; `shape` is (b, n)."""
    k, v = (x.index_select(0, slots).unflatten(0, shape).transpose(1, 2) for x in (keys, values))
    return attend_tokens(q, k, v, mask)


BACKENDS: dict[str, tuple[type[AttentionPlan], ...]] = {
    "sdpa": (
        ContiguousAttention,
        PagedAttention,
        PrefixAttention,
        PaddedAttention,
        BlockAttention,
    ),
    "blocks": (BlockAttention,),
    "varlen": (
        PagedVarlen,
        PrefixVarlen,
        ContiguousAttention,
        PagedAttention,
        PrefixAttention,
        PaddedAttention,
        BlockAttention,
    ),
}
BACKENDS["graphs"] = BACKENDS["sdpa"]
"""Kinds of plans by the name of a backend, in order of preference; the last one serves any call.

With "graphs", the engines record the steps that they can (`neounify.engine.graphs`)."""


@dataclass(frozen=True)
class AttentionBackend:
    """Plans the attention of each call of the model on one device."""

    name: str
    device: torch.device
    kinds: tuple[type[AttentionPlan], ...]

    @property
    def recorded(self) -> bool:
        """Whether the engines record steps."""
        return self.name == "graphs"

    def plan(self, layout: Layout, caches: Caches = None) -> AttentionPlan:
        """The plan of one call, by the first kind that serves it; makes room in the caches.

        Raises ValueError for documents that continue a prefix without their caches.
        """
        pasts = [document.past for document in layout.documents]
        if caches is None and any(pasts):
            raise ValueError(
                f"documents that continue a cached prefix need their caches: {pasts} tokens are "
                "cached of each document, and no caches were given"
            )
        for kind in self.kinds:
            plan = kind.plan(layout, caches, self.device)
            if plan is not None:
                return plan
        raise ValueError(f"attention backend {self.name!r} cannot serve this layout")

    def copied_rows(self, tokens: int) -> int:
        """Rows of keys that a plan copies for a noisy image which sees `tokens` tokens."""
        if tokens > copied_tokens(self.name):
            return 0
        return tokens if PrefixVarlen in self.kinds else MAX_PREFIX


def copied_tokens(name: str) -> int:
    """The most tokens that an image sees whose prefix a backend copies; 0 where it copies none."""
    kinds = BACKENDS["sdpa" if name == "auto" else name]
    if PrefixVarlen in kinds:
        return UNLIMITED
    return MAX_PREFIX if PrefixAttention in kinds else 0


@functools.cache
def select(
    device: torch.device, dtype: torch.dtype, head_dim: int, name: str = "auto"
) -> AttentionBackend:
    """The backend of this name, or with "auto" the best one for device, dtype and head width.

    Raises ConfigError for an unknown name, and for "varlen" where it does not serve them. That and
    "graphs" are chosen by name alone as long as they have not run on a GPU.
    """
    check_backend(name)
    chosen = "sdpa" if name == "auto" else name
    if chosen == "varlen":
        check_varlen(device, dtype, head_dim)
    return AttentionBackend(chosen, device, BACKENDS[chosen])


def check_backend(name: str) -> None:
    """Raise ConfigError for an unknown name of a backend."""
    if name != "auto" and name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ConfigError(f"attention backend {name!r} is unknown; known are {known}")


def select_for(model: NeoUnify, name: str = "auto") -> AttentionBackend:
    """The backend of a model, see `select`."""
    return select(model.device, model.compute_dtype, model.config.head_dim, name)
