"""One packed call of the understanding stream: prefill and decoding steps alike."""

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
class ModelInput:
    """New tokens of one sequence: `spans` in order, the ids of all text, the clean images.

    Images are ImageNet-normalised pixels [3, height, width].
    """

    cache: Cache
    spans: tuple[Span, ...]
    ids: Sequence[int]
    images: Sequence[Tensor] = ()


def forward_und(model: NeoUnify, inputs: Sequence[ModelInput]) -> Float[Tensor, "b d"]:
    """Append to every sequence's cache in one packed call; the last hidden state of each.

    Only the understanding stream runs. Raises ValueError for an input without tokens.
    """
    layout = Layout(item.cache.document(*item.spans) for item in inputs)
    if any(start == stop for start, stop in layout.und_ranges):
        raise ValueError("every sequence needs at least one new token")
    for item, document in zip(inputs, layout.documents, strict=True):
        item.cache.reserve(document.und_length())
    ids = torch.tensor(
        [i for item in inputs for i in item.ids], dtype=torch.int64, device=model.device
    )
    images = [image.to(model.device) for item in inputs for image in item.images]
    x = model.embed_und(layout, ids, images)
    caches = [item.cache for item in inputs]
    single = all(item.spans == (Text(1),) for item in inputs)
    hidden = model.backbone(layout, x, caches=together(caches) if single else caches).und
    assert hidden is not None
    for item, document in zip(inputs, layout.documents, strict=True):
        item.cache.advance(document)
    return hidden[layout.last_rows()]
