"""Keys and values of the understanding stream: storage of single sequences, and of many in blocks.

`SequenceCache` holds one sequence contiguously. A `PagedKVCache` cuts one memory into blocks;
its sequences share the blocks of a common prefix, found by hashes of their tokens' content keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from neounify.cache.block_allocator import BlockAllocator, BlockHash
from neounify.config import ModelConfig
from neounify.model.layout import Document, Span, to_device

if TYPE_CHECKING:
    from neounify.model.neo import NeoUnify

HASH_BYTES = 16


class Cache(Protocol):
    """Keys and values of one sequence: `length` tokens, the next one stands at t = `next_t`."""

    length: int
    next_t: int

    def document(self, *spans: Span) -> Document:
        """New spans that continue this sequence."""

    def reserve(self, extra: int) -> None:
        """Make room for `extra` more tokens."""

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put the keys and values [N, kv_heads, d] of new tokens behind the others."""

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, length, d] of the first `length` tokens."""

    def advance(self, document: Document) -> None:
        """Count the document's tokens, now written in every layer."""


class SequenceCache:
    """Keys and values of one sequence's understanding tokens, [layers, kv_heads, capacity, d].

    `length` tokens are complete; the next token stands at t = `next_t`. The model
    writes behind `length`; `advance` makes what was written part of the sequence.
    A denoising step only reads, so many steps may share one cache. While several caches are
    decoded together, `keys` and `values` are row `row` of a `batch`. `kv_heads` None are those of
    the config; `new_cache` makes the cache of a model.
    """

    GROWTH = 256
    batch: CacheBatch | None = None
    row: int = 0

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv_heads: int | None = None,
    ) -> None:
        shape = (config.num_layers, kv_heads or config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.next_t = 0

    @classmethod
    def holding(cls, keys: Tensor, values: Tensor, next_t: int) -> SequenceCache:
        """A cache over given keys and values [layers, kv_heads, length, d], not copied."""
        cache = object.__new__(cls)
        cache.keys, cache.values = keys, values
        cache.length, cache.next_t = keys.shape[2], next_t
        return cache

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def document(self, *spans: Span) -> Document:
        """New spans that continue this sequence."""
        return Document(spans, past=self.length, start_t=self.next_t)

    def reserve(self, extra: int) -> None:
        """Make room for `extra` more tokens; grows by at least a quarter when it must move."""
        needed = self.length + extra
        if needed <= self.capacity:
            return
        capacity = max(needed, self.capacity + max(self.GROWTH, self.capacity // 4))
        self.keys = self._grown(self.keys, capacity)
        self.values = self._grown(self.values, capacity)
        self.batch = None

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        layers, heads, _, d = old.shape
        new = old.new_empty(layers, heads, capacity, d)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        stop = self.length + k.shape[0]
        self.keys[layer, :, self.length : stop] = k.transpose(0, 1)
        self.values[layer, :, self.length : stop] = v.transpose(0, 1)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer, :, :length], self.values[layer, :, :length]

    def advance(self, document: Document) -> None:
        """Count the document's understanding tokens, now written in every layer."""
        self.length += document.und_length()
        self.next_t = document.end_t


def new_cache(model: NeoUnify, capacity: int) -> SequenceCache:
    """An empty cache for the keys that a model computes."""
    return SequenceCache(
        model.config,
        capacity,
        dtype=model.compute_dtype,
        device=model.device,
        kv_heads=model.kv_heads,
    )


def new_paged_cache(model: NeoUnify, blocks: int, block_size: int) -> PagedKVCache:
    """An empty paged cache for the keys that a model computes."""
    return PagedKVCache(
        model.config,
        blocks,
        block_size,
        dtype=model.compute_dtype,
        device=model.device,
        kv_heads=model.kv_heads,
    )


class CacheBatch:
    """One memory of several caches, [layers, rows, kv_heads, capacity, d].

    Zero where nothing was written: a weight of 0 times NaN would be NaN.
    """

    ROOM = 64
    """Tokens of room at least behind the longest sequence of a new batch."""

    def __init__(self, caches: Sequence[SequenceCache], capacity: int) -> None:
        """Move caches into a new memory."""
        layers, heads, _, d = caches[0].keys.shape
        self.keys = caches[0].keys.new_zeros(layers, len(caches), heads, capacity, d)
        self.values = torch.zeros_like(self.keys)
        for row, cache in enumerate(caches):
            self.keys[:, row, :, : cache.length] = cache.keys[:, :, : cache.length]
            self.values[:, row, :, : cache.length] = cache.values[:, :, : cache.length]
            cache.keys, cache.values = self.keys[:, row], self.values[:, row]
            cache.batch, cache.row = self, row

    @classmethod
    def of(cls, caches: Sequence[SequenceCache], extra: int) -> CacheBatch:
        """The batch of these caches, with room for `extra` more tokens in each.

        A new one where they are in none, have no room, or would be few among the rows of ended
        sequences.
        """
        batch, longest = caches[0].batch, max(cache.length for cache in caches) + extra
        same = batch is not None and all(cache.batch is batch for cache in caches)
        if batch is not None and same:
            rows, capacity = batch.keys.shape[1], batch.keys.shape[3]
            if longest <= capacity and 2 * len(caches) > rows:
                return batch
        return cls(caches, longest + max(cls.ROOM, longest // 4))


class PagedKVCache:
    """Memory of `blocks` · `block_size` slots: keys and values [layers, slots + 1, kv_heads, d].

    The last slot is always zero. Padding reads it, so that nothing of one sequence, NaN least of
    all, reaches another one.

    `open` allocates the blocks of a new sequence, `PagedSequence.grow` further ones. Full blocks
    stay cached until their memory is needed, and a new sequence with the same prefix shares them.
    `kv_heads` None are those of the config; `new_paged_cache` makes the cache of a model.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv_heads: int | None = None,
    ) -> None:
        slots = blocks * block_size + 1
        shape = (config.num_layers, slots, kv_heads or config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size
        self.allocator = BlockAllocator(blocks)
        self._sequences: dict[int, PagedSequence] = {}

    @property
    def zero_slot(self) -> int:
        """The slot that no sequence writes to."""
        return self.keys.shape[1] - 1

    def pages(self, memory: Tensor) -> Tensor:
        """The keys or values as [layers, blocks, block_size, kv_heads, d], a view."""
        return memory[:, : self.zero_slot].unflatten(1, (-1, self.block_size))

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def blocks_needed(
        self, keys: Sequence[TokenKey], hashes: Sequence[BlockHash] | None = None
    ) -> int:
        """Number of available blocks that `open` would allocate for tokens with these keys."""
        shared = sum(self.allocator.used(block) for block in self._cached(keys, hashes))
        return self.blocks_for(len(keys)) - shared

    def open(
        self, keys: Sequence[TokenKey], room: int, hashes: Sequence[BlockHash] | None = None
    ) -> PagedSequence:
        """A sequence for tokens with these keys and up to `room` tokens after them.

        Its `length` tokens are cached already; at least the last one is not, so that there is
        something to compute a prediction from. `hashes` are those of the full blocks, if they were
        computed before. Raises OutOfBlocks.
        """
        blocks = self._cached(keys, hashes)
        cached = len(blocks) * self.block_size
        self.allocator.share(blocks)
        try:
            blocks += self.allocator.allocate(self.blocks_for(len(keys) + room) - len(blocks))
            sequence = PagedSequence(self, blocks, keys[:cached])
        except BaseException:
            self.allocator.release(blocks)
            raise
        if cached < len(keys):
            sequence.next_t = keys[cached].t
        self._sequences[id(sequence)] = sequence
        return sequence

    def invalidate(self, sequence: PagedSequence) -> None:
        """Let no other sequence share what this one holds."""
        self.allocator.evict(sequence.block_table)

    def close(self, sequence: PagedSequence) -> None:
        """Release a sequence's blocks; closing it twice does nothing."""
        if self._sequences.pop(id(sequence), None) is not None:
            self.allocator.release(sequence.block_table)

    def check(self) -> None:
        """Check reference counts and hashes of all sequences. Raises ValueError."""
        self.allocator.check([sequence.block_table for sequence in self._sequences.values()])
        for sequence in self._sequences.values():
            sequence.check()

    def _cached(
        self, keys: Sequence[TokenKey], hashes: Sequence[BlockHash] | None = None
    ) -> list[int]:
        """The blocks of a new sequence that are cached already."""
        hashes = block_hashes(keys, self.block_size) if hashes is None else hashes
        # The last token is always computed again.
        blocks = self.allocator.match_prefix(hashes[: max(0, len(keys) - 1) // self.block_size])
        while blocks and not keys[len(blocks) * self.block_size].starts:
            blocks.pop()
        return blocks


class PagedSequence:
    """One sequence of a PagedKVCache; a `Cache` like SequenceCache.

    `slot_mapping` [capacity] is the slot of each of its tokens. Its caller announces the keys of
    tokens (`expect`) before the model computes them.
    """

    def __init__(
        self, pool: PagedKVCache, block_table: list[int], keys: Sequence[TokenKey]
    ) -> None:
        self.pool, self.block_table = pool, block_table
        self.token_keys = list(keys)
        self.length = len(keys)
        self.next_t = 0
        self._hashes = block_hashes(keys, pool.block_size)
        self.slot_mapping = self._slots(block_table)

    @property
    def capacity(self) -> int:
        return self.slot_mapping.shape[0]

    def document(self, *spans: Span) -> Document:
        """New spans that continue this sequence."""
        return Document(spans, past=self.length, start_t=self.next_t)

    def grow(self, blocks: int) -> None:
        """Allocate further blocks. Raises OutOfBlocks, having allocated none."""
        allocated = self.pool.allocator.allocate(blocks)
        self.block_table += allocated
        self.slot_mapping = torch.cat([self.slot_mapping, self._slots(allocated)])

    def _slots(self, blocks: Sequence[int]) -> Int[Tensor, " n"]:
        size, device = self.pool.block_size, self.pool.keys.device
        starts = torch.tensor(blocks, dtype=torch.int64).unsqueeze(1) * size
        return to_device((starts + torch.arange(size)).flatten(), device)

    def reserve(self, extra: int) -> None:
        """Raises ValueError when the blocks have no room for `extra` more tokens."""
        if self.length + extra > self.capacity:
            raise ValueError(f"{self.length} + {extra} tokens in a room of {self.capacity}")

    def expect(self, keys: Sequence[TokenKey]) -> None:
        """Announce the next tokens."""
        self.token_keys += keys

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        slots = self.slot_mapping[self.length : self.length + k.shape[0]]
        self.pool.keys[layer].index_copy_(0, slots, k)
        self.pool.values[layer].index_copy_(0, slots, v)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        slots = self.slot_mapping[:length]
        k = self.pool.keys[layer].index_select(0, slots)
        v = self.pool.values[layer].index_select(0, slots)
        return k.transpose(0, 1), v.transpose(0, 1)

    def advance(self, document: Document) -> None:
        """Count the document's tokens, now written in every layer; full blocks get cached."""
        self.length += document.und_length()
        self.next_t = document.end_t
        size = self.pool.block_size
        while (len(self._hashes) + 1) * size <= min(self.length, len(self.token_keys)):
            number = len(self._hashes)
            keys = self.token_keys[number * size : (number + 1) * size]
            self._hashes.append(block_hash(self._hashes[-1] if number else b"", keys))
            self.pool.allocator.register(self.block_table[number], self._hashes[-1])

    def gather(self) -> tuple[Tensor, Tensor]:
        """A copy of all keys and values, [layers, kv_heads, length, d]."""
        slots = self.slot_mapping[: self.length]
        memories = (self.pool.keys, self.pool.values)
        # Transposed first, the selection is the only copy and takes half the time.
        k, v = (memory.transpose(1, 2).index_select(2, slots) for memory in memories)
        return k, v

    def check(self) -> None:
        """Compare the hashes with the keys. Raises ValueError."""
        if self._hashes != block_hashes(self.token_keys[: self.length], self.pool.block_size):
            raise ValueError("a sequence's blocks have wrong hashes")


class TokenKey(NamedTuple):
    """Identity of one token of the understanding stream.

    `key` is its content, `t` its position, `starts` whether a sequence may be continued in front
    of it: not inside an image, whose tokens see each other.
    """

    key: bytes
    t: int
    starts: bool


def text_keys(ids: Sequence[int], t: int) -> list[TokenKey]:
    """Keys of text that starts at position `t`."""
    return [TokenKey(b"t%d" % token, t + n, True) for n, token in enumerate(ids)]


def image_keys(digest: bytes, count: int, t: int) -> list[TokenKey]:
    """Keys of a clean image of `count` tokens at position `t`; `digest` is that of its pixels."""
    return [TokenKey(b"i%d " % n + digest, t, n == 0) for n in range(count)]


def block_hash(previous: BlockHash, keys: Sequence[TokenKey]) -> BlockHash:
    """Hash of a full block: of its tokens' keys and of the hash of the block before it."""
    digest = hashlib.blake2b(previous, digest_size=HASH_BYTES)
    for token in keys:
        digest.update(b"%d:" % len(token.key) + token.key)
    return digest.digest()


def block_hashes(
    keys: Sequence[TokenKey], block_size: int, known: Sequence[BlockHash] = ()
) -> list[BlockHash]:
    """Hashes of all full blocks of a sequence; `known` are those of the first ones."""
    hashes = list(known)
    for start in range(len(hashes) * block_size, len(keys) - block_size + 1, block_size):
        previous = hashes[-1] if hashes else b""
        hashes.append(block_hash(previous, keys[start : start + block_size]))
    return hashes
