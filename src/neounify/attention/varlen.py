"""Attention of packed sequences by `torch.nn.attention.varlen.varlen_attn`.

    prefill, decoding   `PagedVarlen`: the paged cache where it lies, without a copy
    denoising           `PrefixVarlen`: prefixes copied once, each with its image's keys behind it

Every block of a layout is one sequence of the kernel: its queries, its document's pages, and as
many valid keys as are visible to its last query. A causal window is aligned to the end, so no mask
is needed. On a CPU the same plans call `reference_varlen_attn`. Not run on a GPU yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neounify.attention.blocks import Caches
from neounify.cache import PagedSequence, SequenceCache
from neounify.errors import ConfigError
from neounify.model.layout import Block, Layout, to_device
from neounify.model.parts import GEN, UND, StreamName
from neounify.model.stream import Projected
from neounify.runtime.devices import abilities

CAUSAL, FULL = (-1, 0), (-1, -1)
"""Windows (left, right) of keys around a query whose position counts from the end."""
MAX_HEAD_DIM = 256
IMPLEMENTATIONS = {9: "FA3", 10: "FA4"}
"""Kernels that read pages, by the major number of a GPU's compute capability."""


@dataclass(frozen=True)
class Kernel:
    """`call` has the signature of `varlen_attn`; `pages`: whether it takes `block_table`."""

    call: Callable[..., Any]
    pages: bool


@functools.cache
def kernel_for(device: torch.device) -> Kernel:
    """The kernel of a device; activates the implementation that reads pages where it is installed.

    That one replaces torch's flash attention in the whole process.
    """
    if device.type != "cuda":
        return Kernel(reference_varlen_attn, pages=True)
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    wanted = IMPLEMENTATIONS.get(abilities(device).capability[0])
    if wanted is not None and current_flash_attention_impl() != wanted:
        try:
            activate_flash_attention_impl(wanted)
        except (ImportError, RuntimeError):
            wanted = None  # its package is not installed
    return Kernel(varlen_attn, pages=wanted is not None)


def serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels of a device serve a dtype and head width."""
    try:
        check_varlen(device, dtype, head_dim)
    except ConfigError:
        return False
    return True


def check_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ConfigError where the kernels of a device do not serve a dtype and head width."""
    if device.type == "cpu":
        return
    here = abilities(device)
    if not here.flash:
        raise ConfigError(f"attention 'varlen' has no kernel for {here}; use 'sdpa'")
    if dtype.itemsize != 2:
        raise ConfigError(f"attention 'varlen' needs bfloat16 or float16, not {dtype}; use 'sdpa'")
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"attention 'varlen' needs heads of a multiple of 8 up to {MAX_HEAD_DIM} channels, not "
            f"{head_dim}; use 'sdpa'"
        )


# --- one call of the kernel ---


class _Sequences:
    """Some blocks of a stream as the sequences of one call: offsets and lengths on the device.

    `rows` are the queries of the blocks, None where they are all rows of the stream.
    """

    def __init__(self, blocks: Sequence[Block], total: int, device: torch.device) -> None:
        lengths = [block.length for block in blocks]
        self.longest = max(lengths)
        self.starts = _offsets(lengths, device)
        self.rows: Tensor | None = None
        if sum(lengths) != total:
            rows = np.concatenate([np.arange(block.start, block.stop) for block in blocks])
            self.rows = to_device(rows, device)

    def of(self, q: Tensor) -> Tensor:
        return q if self.rows is None else q.index_select(0, self.rows)


def _offsets(lengths: Sequence[int], device: torch.device) -> Int[Tensor, " n+1"]:
    return to_device(np.cumsum([0, *lengths], dtype=np.int32), device)


class PagedVarlen:
    """New tokens of sequences of one paged cache: written to their slots, then read in pages.

    Two calls of the kernel a layer at most: causal blocks, and those that see one range.
    """

    def __init__(
        self, layout: Layout, sequences: Sequence[PagedSequence], device: torch.device
    ) -> None:
        pool = sequences[0].pool
        self._kernel = kernel_for(device)
        self._keys, self._values = pool.keys.unbind(0), pool.values.unbind(0)
        pages = [pool.pages(memory) for memory in (pool.keys, pool.values)]
        self._key_pages, self._value_pages = (x.unbind(0) for x in pages)
        new = [stop - start for start, stop in layout[UND].ranges]
        self._new = torch.cat(
            [s.slot_mapping[s.length : s.length + n] for s, n in zip(sequences, new, strict=True)]
        )
        self._calls = []
        for window in (CAUSAL, FULL):
            # A single token sees the same keys either way.
            blocks = [b for b in layout[UND].blocks if b.causal == (window == CAUSAL)]
            if blocks:
                queries = _Sequences(blocks, layout[UND].length, device)
                keys = [sequences[block.document] for block in blocks]
                self._calls.append((window, queries, self._pages_of(blocks, keys, device)))

    def _pages_of(
        self, blocks: Sequence[Block], sequences: Sequence[PagedSequence], device: torch.device
    ) -> tuple[Tensor, Tensor, int]:
        """Pages of each block's document [n, pages], its visible keys [n], and the most visible."""
        visible = [block.visible for block in blocks]
        most = sequences[0].pool.blocks_for(max(visible))
        tables = np.zeros((len(blocks), most), dtype=np.int32)
        for table, sequence in zip(tables, sequences, strict=True):
            used = sequence.block_table[:most]
            table[: len(used)] = used
        used_keys = np.array(visible, dtype=np.int32)
        return to_device(tables, device), to_device(used_keys, device), max(visible)

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PagedVarlen | None:
        sequences = [c for c in caches or () if isinstance(c, PagedSequence)]
        if not sequences or len(sequences) < len(layout.documents) or layout[GEN].length:
            return None
        if len({id(s.pool) for s in sequences}) > 1 or not kernel_for(device).pages:
            return None
        for sequence, (start, stop) in zip(sequences, layout[UND].ranges, strict=True):
            sequence.reserve(stop - start)
        return cls(layout, sequences, device)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[UND]
        self._keys[layer].index_copy_(0, self._new, x.k)
        self._values[layer].index_copy_(0, self._new, x.v)
        out = x.q if len(self._calls) == 1 else torch.empty_like(x.q)
        for window, queries, (tables, visible, most) in self._calls:
            part = self._kernel.call(
                queries.of(x.q),
                self._key_pages[layer],
                self._value_pages[layer],
                queries.starts,
                None,
                queries.longest,
                most,
                window_size=window,
                enable_gqa=x.q.shape[1] != x.k.shape[1],
                seqused_k=visible,
                block_table=tables,
                num_splits=1,
            )
            out = part if queries.rows is None else out.index_copy_(0, queries.rows, part)
        return {UND: out}


class PrefixVarlen:
    """Noisy images behind cached prefixes, packed without padding.

    The prefixes are copied once, each with room for its image behind it, and serve all denoising
    steps, which write their own keys and values over those of the step before.
    """

    def __init__(
        self, layout: Layout, caches: Sequence[SequenceCache], device: torch.device
    ) -> None:
        self._kernel = kernel_for(device)
        blocks = layout[GEN].blocks
        lengths = [block.visible + block.length for block in blocks]
        self._queries = _Sequences(blocks, layout[GEN].length, device)
        self._starts, self._longest = _offsets(lengths, device), max(lengths)
        layers, heads, _, d = caches[0].keys.shape
        keys = caches[0].keys.new_empty(layers, sum(lengths), heads, d)
        values = torch.empty_like(keys)
        images, first = [], 0
        for block, length in zip(blocks, lengths, strict=True):
            cache, prefix = caches[block.document], slice(first, first + block.visible)
            keys[:, prefix] = cache.keys[:, :, : block.visible].transpose(1, 2)
            values[:, prefix] = cache.values[:, :, : block.visible].transpose(1, 2)
            images.append(np.arange(first + block.visible, first + length))
            first += length
        self._keys, self._values = keys.unbind(0), values.unbind(0)
        self._images = to_device(np.concatenate(images), device)

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> PrefixVarlen | None:
        prefixes = [c for c in caches or () if isinstance(c, SequenceCache)]
        if not prefixes or len(prefixes) < len(layout.documents) or layout[UND].length:
            return None
        # The kernel has no gradients for given lengths, and its memory is written in place.
        return None if torch.is_grad_enabled() else cls(layout, prefixes, device)

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        x = streams[GEN]
        keys, values = self._keys[layer], self._values[layer]
        # Under autocast they may differ from the cached prefixes.
        keys.index_copy_(0, self._images, x.k.to(keys.dtype))
        values.index_copy_(0, self._images, x.v.to(values.dtype))
        out = self._kernel.call(
            x.q,
            keys,
            values,
            self._queries.starts,
            self._starts,
            self._queries.longest,
            self._longest,
            enable_gqa=x.q.shape[1] != x.k.shape[1],
        )
        return {GEN: out}


# --- reference ---


def reference_varlen_attn(
    query: Float[Tensor, "q heads d"],
    key: Float[Tensor, "*rows kv_heads d"],
    value: Float[Tensor, "*rows kv_heads d"],
    cu_seq_q: Int[Tensor, " n+1"],
    cu_seq_k: Int[Tensor, " n+1"] | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = FULL,
    enable_gqa: bool = False,
    seqused_k: Int[Tensor, " n"] | None = None,
    block_table: Int[Tensor, "n pages"] | None = None,
    num_splits: int | None = None,
) -> Float[Tensor, "q heads d"]:
    """What `varlen_attn` computes, sequence by sequence, for the windows CAUSAL and FULL.

    `key` and `value` are [k, kv_heads, d] with the offsets `cu_seq_k`, or pages
    [pages, size, kv_heads, d] with the `block_table` and `seqused_k` valid keys of each sequence.
    """
    queries = cu_seq_q.tolist()
    if queries[-1] != query.shape[0] or max(np.diff(queries)) > max_q:
        raise ValueError(f"{query.shape[0]} queries of at most {max_q} do not fit {queries}")
    out = torch.empty_like(query)
    for number, (start, stop) in enumerate(pairwise(queries)):
        k, v = (
            _keys_of(number, memory, cu_seq_k, seqused_k, block_table) for memory in (key, value)
        )
        if k.shape[0] > max_k:
            raise ValueError(f"sequence {number} has {k.shape[0]} keys, max_k is {max_k}")
        mask = None
        if window_size == CAUSAL:
            ones = torch.ones(stop - start, k.shape[0], dtype=torch.bool, device=query.device)
            mask = ones.tril(k.shape[0] - (stop - start))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query[start:stop], k, v))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
        out[start:stop] = attended.squeeze(0).transpose(0, 1)
    return out


def _keys_of(
    number: int,
    memory: Tensor,
    starts: Tensor | None,
    used: Tensor | None,
    tables: Tensor | None,
) -> Float[Tensor, "m kv_heads d"]:
    """The valid keys, or values, of one sequence."""
    if tables is None:
        assert starts is not None
        keys = memory[int(starts[number]) : int(starts[number + 1])]
    else:
        keys = memory[tables[number].long()].flatten(0, 1)
    return keys if used is None else keys[: int(used[number])]
