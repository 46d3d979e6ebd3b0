"""Fusing the elementwise work of a model with torch.compile, from outside the model."""

import torch

from neounify.model.neo import NeoUnify
from neounify.model.stream import Stream


def compile_streams(model: NeoUnify) -> None:
    """Compile the projections, norms and MLPs of every layer, in place.

    The first calls take some seconds longer, and a C++ compiler must be there on a CPU. It
    pays for prefill and painting; attention and the caches stay as they are.
    """
    for module in model.modules():
        if isinstance(module, Stream):
            module.project = torch.compile(module.project, dynamic=True)  # type: ignore[method-assign]
            module.finish = torch.compile(module.finish, dynamic=True)  # type: ignore[method-assign]
