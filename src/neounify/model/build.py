"""Construction of a model without values, and compilation of its streams from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from neounify.config import ModelConfig
from neounify.model.neo import NeoUnify
from neounify.model.stream import OutputMlp, QKVProjection

MIN_ROWS = 32
"""Below, the guards of a compiled function cost more than it saves."""


def compile_streams(model: NeoUnify, wanted: bool = True) -> None:
    """Compile both halves of every stream in every layer, in place.

    The first calls take some seconds longer, and a C++ compiler must be there on a CPU. It
    pays for prefill and denoising; attention and the decoding of single tokens stay as they are.
    Hooks of the halves and of what is in them are called as before. `wanted` False undoes it.
    """
    for module in model.modules():
        if isinstance(module, (QKVProjection, OutputMlp)):
            # Where `Module.compile` puts its result too, which is called in place of `_call_impl`.
            module._compiled_call_impl = _compiled(module._call_impl) if wanted else None


def _compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(eager, dynamic=True)

    def call(x: Tensor, other: Any) -> Any:
        return (compiled if x.shape[0] >= MIN_ROWS else eager)(x, other)

    return call


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
