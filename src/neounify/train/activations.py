"""Activation checkpointing, put around the layers from outside the model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from neounify.model.neo import NeoUnify
from neounify.model.stream import Layer


def checkpoint_layers(model: NeoUnify, wanted: bool) -> None:
    """Let every layer keep its input only and compute its inside again in the backward pass.

    About a third more computing for a memory that grows with one layer's activations instead of
    all layers' (Chen et al. 2016). `wanted` False puts the plain layers back.
    """
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.__dict__.pop("forward", None)
        if wanted:
            layer.forward = partial(_again, layer.forward)  # type: ignore[method-assign]


def _again(forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False)
