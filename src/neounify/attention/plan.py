"""An attention plan: the joint attention of every layer in one call of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neounify.cache.contiguous import Cache
from neounify.model.layout import Layout
from neounify.model.parts import StreamName
from neounify.model.stream import Projected

Caches = Sequence[Cache] | None
"""One cache per document; None where nothing is cached, as in training."""


class AttentionPlan(Protocol):
    """Joint attention for one layout and its caches, with all index tensors on the device.

    Called once per layer. New keys and values of the context stream are written to the caches;
    those of other streams are never stored.
    """

    @classmethod
    def plan(cls, layout: Layout, caches: Caches, device: torch.device) -> AttentionPlan | None:
        """A plan, or None for layouts and caches that this kind of attention does not serve."""

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        """What the queries of each stream gather, [N, heads, d], from the values they see."""


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
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


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
