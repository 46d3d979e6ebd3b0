"""Running new understanding tokens through the model: prefill and single steps alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.cache import Cache
from neounify.cache.paged import together
from neounify.model.layout import Layout, Span, Text
from neounify.model.neo import NeoUnify


@dataclass(frozen=True)
class Feed:
    """New tokens for one sequence: `spans` in order, the ids of all text, the clean images.

    Images are ImageNet-normalised pixels [3, height, width].
    """

    cache: Cache
    spans: tuple[Span, ...]
    ids: Sequence[int]
    images: Sequence[Tensor] = ()


def feed(model: NeoUnify, feeds: Sequence[Feed]) -> Float[Tensor, "b d"]:
    """Append to every sequence's cache in one packed call; the last hidden state of each.

    Only the understanding stream runs. Raises ValueError for a feed without tokens.
    """
    layout = Layout(f.cache.document(*f.spans) for f in feeds)
    if any(start == stop for start, stop in layout.und_ranges):
        raise ValueError("every sequence must be fed at least one token")
    for f, document in zip(feeds, layout.documents, strict=True):
        f.cache.reserve(document.und_length())
    ids = torch.tensor([i for f in feeds for i in f.ids], dtype=torch.int64, device=model.device)
    images = [image.to(model.device) for f in feeds for image in f.images]
    x = model.embed_und(layout, ids, images)
    caches = [f.cache for f in feeds]
    single = all(f.spans == (Text(1),) for f in feeds)
    hidden = model.backbone(layout, x, caches=together(caches) if single else caches).und
    assert hidden is not None
    for f, document in zip(feeds, layout.documents, strict=True):
        f.cache.advance(document)
    return hidden[layout.last_rows()]
