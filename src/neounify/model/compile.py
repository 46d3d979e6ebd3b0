"""Fusing the elementwise work of a model with torch.compile, from outside the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neounify.model.neo import NeoUnify
from neounify.model.stream import Stream

FEWEST_ROWS = 32
"""Below, the guards of a compiled function cost more than it saves."""


def compile_streams(model: NeoUnify, wanted: bool = True) -> None:
    """Compile the projections, norms and MLPs of every layer, in place.

    The first calls take some seconds longer, and a C++ compiler must be there on a CPU. It
    pays for prefill and painting; attention and the writing of single tokens stay as they are.
    `wanted` False puts the plain functions back.
    """
    for module in model.modules():
        if isinstance(module, Stream):
            module.__dict__.pop("project", None)
            module.__dict__.pop("finish", None)
            if not wanted:
                continue
            module.project = _compiled(module.project)  # type: ignore[method-assign]
            module.finish = _compiled(module.finish)  # type: ignore[method-assign]


def _compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(eager, dynamic=True)

    def call(x: Tensor, other: Any) -> Any:
        return (compiled if x.shape[0] >= FEWEST_ROWS else eager)(x, other)

    return call
