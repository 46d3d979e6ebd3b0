"""Packed forward call of the understanding stream, for prefill and decoding steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.attention import AttentionBackend, select_for
from neounify.cache import Cache
from neounify.model.layout import Layout, Span
from neounify.model.neo import NeoUnify
from neounify.model.parts import UND


@dataclass(frozen=True)
class ModelInput:
    """New tokens of one sequence: `spans` in order, the ids of all text, the clean images.

    Images are ImageNet-normalised pixels [3, height, width].
    """

    cache: Cache
    spans: tuple[Span, ...]
    ids: Sequence[int]
    images: Sequence[Tensor] = ()


def forward_und(
    model: NeoUnify, inputs: Sequence[ModelInput], backend: AttentionBackend | None = None
) -> Float[Tensor, "b d"]:
    """Append to every sequence's cache in one packed call; the last hidden state of each.

    Only the understanding stream runs. Raises ValueError for an input without tokens.
    """
    layout = Layout(item.cache.document(*item.spans) for item in inputs)
    if any(start == stop for start, stop in layout[UND].ranges):
        raise ValueError("every sequence needs at least one new token")
    attend = (backend or select_for(model)).plan(layout, [item.cache for item in inputs])
    ids = torch.tensor(
        [i for item in inputs for i in item.ids], dtype=torch.int64, device=model.device
    )
    images = [image.to(model.device) for item in inputs for image in item.images]
    x = model.embed_und(layout, ids, images)
    hidden = model.backbone(layout, {UND: x}, attend)[UND]
    for item, document in zip(inputs, layout.documents, strict=True):
        item.cache.advance(document)
    return hidden if layout.is_decode else hidden[layout.last_rows()]
