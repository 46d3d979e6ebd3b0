"""Tensors that travel between processes through shared memory."""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neounify.engine.tensors import TensorRef
from neounify.errors import TensorsGone
from neounify.serve.shared_memory import PREFIX, remove_piece, take_piece, write_piece


@dataclass(frozen=True)
class Place:
    """What a tensor in shared memory is."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class SharedTensors:
    """Tensors by name, one after the other in a piece of shared memory."""

    memory: str
    places: Mapping[str, Place]

    def free(self) -> None:
        remove_piece(self.memory)


class SharedTransport:
    """For engines in processes of their own: one copy into shared memory and one out of it.

    Its pieces are named `prefix` and 1, 2, 3, …; `made` is the newest number.
    """

    copies = True

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = prefix or f"{PREFIX}{secrets.token_hex(6)}_"
        self.made = 0
        self._numbers = itertools.count(1)

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        places = {
            name: Place(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        }
        number = next(self._numbers)  # atomic: the front packs in several threads at once
        memory = f"{self.prefix}{number}"
        write_piece(memory, (_bytes(tensor.cpu().contiguous()) for tensor in tensors.values()))
        self.made = max(self.made, number)
        return SharedTensors(memory, places)

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        assert isinstance(ref, SharedTensors)
        found = {
            name: torch.empty(place.shape, dtype=getattr(torch, place.dtype))
            for name, place in ref.places.items()
        }
        if not take_piece(ref.memory, [_bytes(tensor) for tensor in found.values()]):
            raise TensorsGone(f"the tensors {', '.join(ref.places)} are gone")
        return found


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
