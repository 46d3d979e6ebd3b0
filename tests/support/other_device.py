"""A device without values, to run whole tasks on and list what they need of a device.

The model is on torch's meta device. Copies to the host are zero and True, so that the code that
reads them runs as it would; every operator with a tensor of the device is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def _is_there(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta
