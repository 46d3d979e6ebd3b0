"""Construction of a model without values, and compilation of its streams from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neounify.config import ModelConfig
from neounify.errors import ConfigError
from neounify.model.neo import NeoUnify
from neounify.model.stream import Layer, call_plain
from neounify.runtime.devices import abilities

COMPILED_WEIGHTS = 1_000_000_000
"""Weights of linear layers from which a model is compiled on a GPU without being asked."""
MIN_ROWS = 32
"""Below, the guards of a compiled function cost more than it saves."""


def compiles_by_default(model: NeoUnify, *, resident: bool) -> bool:
    """Whether the layers are compiled unless a caller says otherwise: a rule, not a measurement.

    On a GPU that has a compiler, where all weights are there for good (`resident`), in plain linear
    layers of at least COMPILED_WEIGHTS: a smaller model has done its work before it is compiled.
    """
    if model.device.type != "cuda" or not resident or abilities(model.device).compiler:
        return False
    modules = list(model.layers.modules())
    if any(module._forward_pre_hooks for module in modules):
        return False
    layers = [m for m in modules if isinstance(m, nn.Linear)]
    plain = all(type(layer) is nn.Linear for layer in layers)
    return plain and sum(layer.weight.numel() for layer in layers) >= COMPILED_WEIGHTS


def check_compile(device: torch.device) -> None:
    """Raise ConfigError where torch.compile lacks something for a device."""
    if missing := abilities(device).compiler:
        raise ConfigError(f"compile on {device} needs {missing}, which is not here; leave it out")


def compile_streams(model: NeoUnify, wanted: bool = True) -> None:
    """Compile both halves of every stream in every layer, in place.

    The first calls take some seconds longer, and a C++ compiler must be there on a CPU. It
    pays for prefill and denoising; attention and the decoding of single tokens stay as they are.
    Hooks of the halves and of what is in them are called as before. A copy of the model is not
    compiled. `wanted` False undoes it.
    """
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.call = _compiled_call(layer) if wanted else call_plain


def _compiled_call(layer: Layer) -> Callable[[nn.Module, Tensor, Any], Any]:
    halves = (half for stream in layer.values() for half in stream.children())
    compiled = {half: torch.compile(half, dynamic=True) for half in halves}

    # A copy of the layer has this function too, but other halves: they are called as they are.
    def call(half: nn.Module, x: Tensor, other: Any) -> Any:
        return (compiled.get(half, half) if x.shape[0] >= MIN_ROWS else half)(x, other)

    return call


@contextmanager
def computing_in(model: NeoUnify, dtype: torch.dtype) -> Iterator[None]:
    """The model with activations of a dtype between its layers, whatever its weights have."""
    before, model.compute_dtype = model.compute_dtype, dtype
    try:
        yield
    finally:
        model.compute_dtype = before


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


def is_initializer(func: Callable[..., Any]) -> bool:
    """Whether a function is one of torch.nn.init that fills a tensor in place."""
    return getattr(func, "__module__", "") == "torch.nn.init" and func.__name__.endswith("_")


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
        if is_initializer(func):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
