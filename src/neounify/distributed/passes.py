"""Inference with a model that is cut over ranks: each rank samples by itself, and passes meet.

A layer is gathered when it runs, by all ranks together, and no rank has the whole model. Ranks do
not sample equally much: before every pass through the layers they say whether they have one, and
one that has none runs the layers without rows until none has (experts, which exchange rows, then
meet too). What stands outside the layers is gathered once, for all passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from neounify.distributed.ranks import Ranks
from neounify.model.build import compile_streams, computing_in
from neounify.model.neo import NeoUnify
from neounify.model.parts import UND, StreamName
from neounify.model.stream import Layer, Projected, Rotation


@contextmanager
def passes_of_ranks(
    objective: FSDPModule, model: NeoUnify, ranks: Ranks, dtype: torch.dtype
) -> Iterator[NeoUnify]:
    """The model for calls of each rank by itself; entering and leaving it are collective.

    `dtype` is what its weights are gathered in. Each call goes through all layers in their order.
    The objective has been called before.
    """
    busy = True

    def begin(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if busy:
            ranks.gather(True)

    hook = model.layers[0].register_forward_pre_hook(begin, prepend=True)
    with torch.no_grad():
        objective.unshard()
    calls = [layer.call for layer in _layers(model)]
    compile_streams(model, False)
    try:
        with computing_in(model, dtype):
            yield model
    finally:
        busy = False
        with torch.inference_mode():
            while any(ranks.gather(False)):
                _pass_without_rows(model, dtype)
        hook.remove()
        for layer, call in zip(_layers(model), calls, strict=True):
            layer.call = call
        objective.reshard()


def _layers(model: NeoUnify) -> Iterator[Layer]:
    for layer in model.layers:
        assert isinstance(layer, Layer)
        yield layer


def _pass_without_rows(model: NeoUnify, dtype: torch.dtype) -> None:
    config, device = model.config, model.device
    none = torch.zeros(0, 1, config.head_dim, dtype=dtype, device=device)
    hidden = {UND: torch.zeros(0, config.hidden_size, dtype=dtype, device=device)}
    for layer in _layers(model):
        hidden = layer(hidden, {UND: Rotation(none, none)}, _no_attention)


def _no_attention(
    number: int, projected: Mapping[StreamName, Projected]
) -> Mapping[StreamName, Tensor]:
    return {name: one.q for name, one in projected.items()}
