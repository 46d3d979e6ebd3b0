"""The softmax that both streams share, in ways that give the same result.

Block by block of the layout: inside a block every query sees the same keys, or the same
keys up to itself, so no L × L mask is ever built and memory grows linearly with the length
of the sequence. Or, where documents are many and short, padded side by side under one mask:
those of training, which have no caches, and cached ones that take one token or paint an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neounify.model.block import Block
from neounify.model.key_values import Caches, NoiseBatch, TokenBatch
from neounify.model.layout import Layout
from neounify.model.padding import Padding

CAUSAL_CHUNK = 256
"""Queries of a causal block that share one mask; measured, see docs/log.md."""


class Projected(NamedTuple):
    """Queries [N, heads, d], keys and values [N, kv_heads, d] of one stream, rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


def shared_attention(
    und: Projected | None,
    gen: Projected | None,
    layout: Layout,
    caches: Caches | None,
    layer: int,
) -> tuple[Float[Tensor, "u heads d"] | None, Float[Tensor, "g heads d"] | None]:
    """What each query of either stream gathers from the values it sees.

    With caches (one per document), new understanding keys are written to them and
    all understanding keys are read from them; without, they are those of this call.
    Generation keys are never stored.
    """
    if isinstance(caches, TokenBatch):
        if und is None or gen is not None:
            raise ValueError("a batch of single tokens is of the understanding stream only")
        return _attend_tokens(und, caches, layer), None
    if isinstance(caches, NoiseBatch):
        if gen is None or und is not None:
            raise ValueError("a batch of noisy images is of the generation stream only")
        return None, _attend_images(gen, caches, layer)
    if caches is None:
        some = und if und is not None else gen
        padding = None if some is None else layout.padding(some.q.device)
        if padding is not None:
            return _padded_attention(und, gen, padding)
    if und is not None and caches is not None:
        for cache, (start, stop) in zip(caches, layout.und_ranges, strict=True):
            if stop > start:
                cache.write(layer, und.k[start:stop], und.v[start:stop])

    def und_keys(block: Block) -> tuple[Tensor, Tensor]:
        if caches is not None:
            return caches[block.document].read(layer, block.visible)
        start = layout.und_ranges[block.document][0]
        if und is None:
            return _no_keys(gen)
        rows = slice(start, start + block.visible)
        return und.k[rows].transpose(0, 1), und.v[rows].transpose(0, 1)

    und_out = gen_out = None
    if und is not None:
        und_out = _join(
            [
                _attend_causal(und.q[b.start : b.stop], *und_keys(b))
                if b.causal
                else _attend(und.q[b.start : b.stop], *und_keys(b))
                for b in layout.und_blocks
            ]
        )
    if gen is not None:
        gen_out = _join([_attend_noise(gen, b, *und_keys(b)) for b in layout.gen_blocks])
    return und_out, gen_out


def _attend_tokens(und: Projected, caches: TokenBatch, layer: int) -> Tensor:
    caches.write_tokens(layer, und.k, und.v)
    k, v, real = caches.padded(layer)
    out = scaled_dot_product_attention(
        und.q.unsqueeze(2),
        k,
        v,
        attn_mask=real[:, None, None],
        enable_gqa=und.q.shape[1] != k.shape[1],
    )
    return out.squeeze(2)


def _attend_images(gen: Projected, caches: NoiseBatch, layer: int) -> Tensor:
    k, v, real = caches.with_images(layer, gen.k, gen.v)
    shape = (k.shape[0], caches.longest)
    q = gen.q.new_zeros(shape[0] * shape[1], *gen.q.shape[1:]).index_copy_(0, caches.slots, gen.q)
    out = _masked_attention(q.unflatten(0, shape).transpose(1, 2), k, v, real[:, None, None])
    return out.transpose(1, 2).flatten(0, 1).index_select(0, caches.slots)


def _padded_attention(
    und: Projected | None, gen: Projected | None, padding: Padding
) -> tuple[Tensor | None, Tensor | None]:
    streams = ((und, padding.und_slots), (gen, padding.gen_slots))
    present = [(x, slots) for x, slots in streams if x is not None]
    slots = torch.cat([slots for _, slots in present])
    documents, longest, _ = padding.mask.shape

    def side_by_side(rows: Sequence[Tensor]) -> Tensor:
        x = torch.cat(list(rows))
        padded = x.new_zeros(documents * longest, *x.shape[1:]).index_copy(0, slots, x)
        return padded.unflatten(0, (documents, longest)).transpose(1, 2)

    q, k, v = (side_by_side(parts) for parts in zip(*(x for x, _ in present), strict=True))
    out = _masked_attention(q, k, v, padding.mask.unsqueeze(1))
    rows = out.transpose(1, 2).flatten(0, 1)[slots].split([x.q.shape[0] for x, _ in present])
    found = iter(rows)
    und_out = None if und is None else next(found)
    gen_out = None if gen is None else next(found)
    if und is not None and und_out is not None and not any(x.requires_grad for x in und):
        # Nothing it sees is trained; it only shared a product with the other stream.
        und_out = und_out.detach()
    return und_out, gen_out


def _masked_attention(
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
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def _join(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _no_keys(gen: Projected | None) -> tuple[Tensor, Tensor]:
    assert gen is not None
    empty = gen.k[:0].transpose(0, 1)
    return empty, empty


def _attend_noise(gen: Projected, block: Block, k: Tensor, v: Tensor) -> Tensor:
    rows = slice(block.start, block.stop)
    k = torch.cat([k, gen.k[rows].transpose(0, 1)], dim=1)
    v = torch.cat([v, gen.v[rows].transpose(0, 1)], dim=1)
    return _attend(gen.q[rows], k, v)


def _attend_causal(
    q: Float[Tensor, "n heads d"], k: Float[Tensor, "kv m d"], v: Float[Tensor, "kv m d"]
) -> Float[Tensor, "n heads d"]:
    """The last n of m tokens look at themselves and at what came before."""
    length, before = q.shape[0], k.shape[1] - q.shape[0]
    if length == 1:
        return _attend(q, k, v)
    if before == 0:
        return _attend(q, k, v, is_causal=True)
    chunks = []
    for start in range(0, length, CAUSAL_CHUNK):
        stop = min(start + CAUSAL_CHUNK, length)
        seen = before + stop
        mask = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device)
        mask = mask.tril(before + start)
        chunks.append(_attend(q[start:stop], k[:, :seen], v[:, :seen], mask=mask))
    return _join(chunks)


def _attend(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "kv m d"],
    v: Float[Tensor, "kv m d"],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "n heads d"]:
    out = scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q.shape[1] != k.shape[0],
    )
    return out.squeeze(0).transpose(0, 1)
