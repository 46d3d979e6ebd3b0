"""A device without values, to run whole tasks on and list what they need of a device.

The model is on torch's meta device. Copies to the host are zero and True, so that the code that
reads them runs as it would; every operator with a tensor of the device is recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class OtherDevice(TorchDispatchMode):
    """Inside it, tasks of a model on the meta device run, and `operators` fills."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, set[torch.dtype]] = {}
        """Operator → dtypes of the device's tensors that went in or came out."""
        self.waits: list[str] = []
        """Operators for which the host would wait: reads of the device's values, results whose
        size depends on them, and copies to the device that were not asked to be asynchronous."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        # In inference mode composite operators arrive whole; devices implement their parts.
        with self:
            parts = func.decompose(*args, **options)
        if parts is not NotImplemented:
            return parts
        if _waits(func, args, options):
            self.waits.append(f"{func} {_caller()}")
        result = self._to_host(func, args, options)
        if result is None:
            result = func(*args, **options)
        there = [x for x in tree_leaves((args, options, result)) if _is_there(x)]
        if there:
            self.operators.setdefault(str(func), set()).update(x.dtype for x in there)
        return result

    def _to_host(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The result of an operator that reads values of the device; None for any other."""
        if not args:
            return None
        if func is aten._local_scalar_dense.default and _is_there(args[0]):
            return args[0].dtype == torch.bool or 0
        if func is aten._to_copy.default and _is_there(args[0]):
            if options.get("device") in (None, torch.device("meta")):
                return None
            dtype = options.get("dtype") or args[0].dtype
            return torch.full(args[0].shape, dtype == torch.bool, dtype=dtype)
        if func is aten.copy_.default and not _is_there(args[0]) and _is_there(args[1]):
            return args[0].fill_(args[0].dtype == torch.bool)
        if func is aten.nonzero.default and _is_there(args[0]):
            return args[0].new_empty(1, args[0].ndim, dtype=torch.int64)
        return None


READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


def _waits(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    if func in READS:
        return _is_there(args[0])
    if func is aten._to_copy.default:
        there = options.get("device", args[0].device) == torch.device("meta")
        if _is_there(args[0]):
            return not there
        return there and not options.get("non_blocking", False)
    if func is aten.copy_.default and _is_there(args[0]) != _is_there(args[1]):
        non_blocking = args[2] if len(args) > 2 else options.get("non_blocking", False)
        return _is_there(args[1]) or not non_blocking
    return False


@contextmanager
def watching() -> Iterator[OtherDevice]:
    """The device, whose `waits` also have `torch.tensor(values, device=…)` and lists as indices:
    both copy and wait, and show in no operator."""
    device = OtherDevice()
    waits = device.waits
    make, index, put = torch.tensor, Tensor.__getitem__, Tensor.__setitem__

    def tensor(*args: Any, **kwargs: Any) -> Tensor:
        result = make(*args, **kwargs)
        if _is_there(result):
            waits.append(f"torch.tensor {_caller()}")
        return result

    def look(x: Tensor, key: Any) -> None:
        keys = key if isinstance(key, tuple) else (key,)
        if _is_there(x) and any(isinstance(k, list | range) for k in keys):
            waits.append(f"list as index {_caller()}")

    def getitem(x: Tensor, key: Any) -> Tensor:
        look(x, key)
        return index(x, key)

    def setitem(x: Tensor, key: Any, values: Any) -> None:
        look(x, key)
        put(x, key, values)

    with (
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(Tensor, "__getitem__", getitem),
        mock.patch.object(Tensor, "__setitem__", setitem),
        device,
    ):
        yield device


def _caller() -> str:
    """File and line of the package that called an operator."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and "/neounify/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _is_there(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta
