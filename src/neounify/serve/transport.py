"""How tensors travel between the engines: by reference, or through shared memory.

A parcel is for one receiver, who takes the tensors out once. It belongs to the front of the server
from the moment it packs it or receives it: what was not taken when a call ends is freed there, no
matter which side packed it.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neounify.serve.events import ParcelGone
from neounify.serve.shared_memory import PREFIX, remove_piece, take_piece, write_piece


@dataclass(frozen=True, eq=False)
class LocalParcel:
    """Tensors by name, in this process; none once they were taken."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """What a tensor in shared memory is."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class SharedParcel:
    """Tensors by name, one after the other in a piece of shared memory."""

    memory: str
    places: Mapping[str, Place]


Parcel = LocalParcel | SharedParcel


class Transport(Protocol):
    """Packs tensors for one receiver, who takes them out.

    `copies`: whether that copies them, which takes as long as they are large.
    """

    copies: bool

    def pack(self, tensors: Mapping[str, Tensor]) -> Parcel:
        """A parcel with copies of the tensors, or the tensors themselves. Raises OutOfMemory."""

    def take(self, parcel: Parcel) -> Mapping[str, Tensor]:
        """The tensors of a parcel, which is freed. Raises ParcelGone."""


def free(parcel: Parcel) -> None:
    """Give back the memory of a parcel nobody will take; one that is gone is no error."""
    if isinstance(parcel, SharedParcel):
        remove_piece(parcel.memory)
    else:
        parcel.tensors.clear()


class LocalTransport:
    """For engines in one process: parcels hold the tensors themselves."""

    copies = False

    def pack(self, tensors: Mapping[str, Tensor]) -> Parcel:
        return LocalParcel(dict(tensors))

    def take(self, parcel: Parcel) -> Mapping[str, Tensor]:
        assert isinstance(parcel, LocalParcel)
        found = dict(parcel.tensors)
        parcel.tensors.clear()
        if not found:
            raise ParcelGone("the tensors of the request were given up or taken before")
        return found


class SharedTransport:
    """For engines in processes of their own: one copy into shared memory and one out of it.

    Its pieces are named `prefix` and 1, 2, 3, …; `made` is the newest number.
    """

    copies = True

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = prefix or f"{PREFIX}{secrets.token_hex(6)}_"
        self.made = 0
        self._numbers = itertools.count(1)

    def pack(self, tensors: Mapping[str, Tensor]) -> Parcel:
        places = {
            name: Place(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        }
        number = next(self._numbers)  # atomic: the front packs in several threads at once
        memory = f"{self.prefix}{number}"
        write_piece(memory, (_bytes(tensor.cpu().contiguous()) for tensor in tensors.values()))
        self.made = max(self.made, number)
        return SharedParcel(memory, places)

    def take(self, parcel: Parcel) -> Mapping[str, Tensor]:
        assert isinstance(parcel, SharedParcel)
        found = {
            name: torch.empty(place.shape, dtype=getattr(torch, place.dtype))
            for name, place in parcel.places.items()
        }
        if not take_piece(parcel.memory, [_bytes(tensor) for tensor in found.values()]):
            raise ParcelGone(f"the tensors {', '.join(parcel.places)} are gone")
        return found


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
