"""Fusing the elementwise work of a model with torch.compile, from outside the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neounify.model.neo import NeoUnify
from neounify.model.stream import OutputMlp, QKVProjection

MIN_ROWS = 32
"""Below, the guards of a compiled function cost more than it saves."""


def compile_streams(model: NeoUnify, wanted: bool = True) -> None:
    """Compile both halves of every stream in every layer, in place.

    The first calls take some seconds longer, and a C++ compiler must be there on a CPU. It
    pays for prefill and denoising; attention and the decoding of single tokens stay as they are.
    `wanted` False puts the plain functions back.
    """
    for module in model.modules():
        if isinstance(module, (QKVProjection, OutputMlp)):
            module.__dict__.pop("forward", None)
            if wanted:
                module.forward = _compiled(module.forward)  # type: ignore[method-assign]


def _compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(eager, dynamic=True)

    def call(x: Tensor, other: Any) -> Any:
        return (compiled if x.shape[0] >= MIN_ROWS else eager)(x, other)

    return call
