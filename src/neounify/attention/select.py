"""Choice of the attention backend, once per model, by name or by device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from neounify.attention.blocks import BlockAttention
from neounify.attention.contiguous import ContiguousAttention
from neounify.attention.padded import PaddedAttention
from neounify.attention.paged import PagedAttention
from neounify.attention.plan import AttentionPlan, Caches
from neounify.attention.prefix import PrefixAttention
from neounify.errors import ConfigError
from neounify.model.layout import Layout
from neounify.model.neo import NeoUnify

BACKENDS: Mapping[str, tuple[type[AttentionPlan], ...]] = {
    "sdpa": (
        ContiguousAttention,
        PagedAttention,
        PrefixAttention,
        PaddedAttention,
        BlockAttention,
    ),
    "blocks": (BlockAttention,),
}
"""Kinds of plans by the name of a backend, in order of preference; the last one serves any call."""


@dataclass(frozen=True)
class AttentionBackend:
    """Plans the attention of each call of the model on one device."""

    name: str
    device: torch.device
    kinds: tuple[type[AttentionPlan], ...]

    def plan(self, layout: Layout, caches: Caches = None) -> AttentionPlan:
        """The plan of one call, by the first kind that serves it; makes room in the caches.

        Raises ValueError for documents that continue a prefix without their caches.
        """
        if caches is None and any(document.past for document in layout.documents):
            raise ValueError("documents that continue a cached prefix need their caches")
        for kind in self.kinds:
            plan = kind.plan(layout, caches, self.device)
            if plan is not None:
                return plan
        raise ValueError(f"attention backend {self.name!r} cannot serve this layout")


@cache
def select(
    device: torch.device, dtype: torch.dtype, head_dim: int, name: str = "auto"
) -> AttentionBackend:
    """The backend of this name, or with "auto" the best one for device, dtype and head width.

    All there are now serve every device, dtype and width. Raises ConfigError for an unknown name.
    """
    if name != "auto" and name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ConfigError(f"attention backend {name!r} is unknown; known are {known}")
    chosen = "sdpa" if name == "auto" else name
    return AttentionBackend(chosen, device, BACKENDS[chosen])


def select_for(model: NeoUnify, name: str = "auto") -> AttentionBackend:
    """The backend of a model, see `select`."""
    return select(model.device, model.compute_dtype, model.config.head_dim, name)
