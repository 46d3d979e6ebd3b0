"""Modules without values: shapes and dtypes only, to be filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from neounify.config import ModelConfig
from neounify.model.neo import NeoUnify


def meta_model(config: ModelConfig) -> NeoUnify:
    """The model without values: no memory, no gradients."""
    with without_values():
        return NeoUnify(config).requires_grad_(False)


@contextmanager
def without_values() -> Iterator[None]:
    """Construct modules on the meta device, and skip the initialisation of their parameters.

    Drawing normal values on the meta device would import torch._dynamo, which takes longer than
    torch itself.
    """
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Makes the functions of torch.nn.init return their tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" and func.__name__.endswith("_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
