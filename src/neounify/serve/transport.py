"""Tensor transport between processes through shared memory."""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neounify.engine.messages import TensorRef
from neounify.errors import TensorsGone
from neounify.serve.shared_memory import PREFIX, remove_piece, take_piece, write_piece


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor in shared memory."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class SharedTensors:
    """Tensors by name, one after the other in a piece of shared memory."""

    memory: str
    specs: Mapping[str, TensorSpec]

    def free(self) -> None:
        remove_piece(self.memory)


class SharedTransport:
    """Transport of engine processes: one copy into shared memory and one out of it.

    Its pieces are named `prefix` and 1, 2, 3, …; `last_piece` is the newest number, or 0.
    """

    copies = True

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = prefix or f"{PREFIX}{secrets.token_hex(6)}_"
        self.last_piece = 0
        self._numbers = itertools.count(1)

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        specs = {
            name: TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        }
        number = next(self._numbers)  # atomic: the server packs in several threads at once
        memory = f"{self.prefix}{number}"
        write_piece(memory, (_bytes(tensor.cpu().contiguous()) for tensor in tensors.values()))
        self.last_piece = max(self.last_piece, number)
        return SharedTensors(memory, specs)

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        assert isinstance(ref, SharedTensors)
        tensors = {
            name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
            for name, spec in ref.specs.items()
        }
        if not take_piece(ref.memory, [_bytes(tensor) for tensor in tensors.values()]):
            raise TensorsGone(f"the tensors {', '.join(ref.specs)} are gone")
        return tensors


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
