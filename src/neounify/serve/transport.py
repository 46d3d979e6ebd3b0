"""How tensors travel between the engines: by reference, or through shared memory.

A parcel is for one receiver, who takes the tensors out. What nobody took, because a call was given
up or an engine died, the front of the server frees when the call has ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Protocol

import torch
from torch import Tensor

from neounify.errors import NeounifyError

ALIGNMENT = 64


class ParcelGone(NeounifyError):
    """A parcel was freed before it was taken: its call was given up."""


@dataclass(frozen=True)
class LocalParcel:
    """Tensors by name, in this process."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in shared memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class SharedParcel:
    """Tensors by name, in a piece of shared memory that any process of this machine can map."""

    memory: str
    places: Mapping[str, Place]


Parcel = LocalParcel | SharedParcel


class Transport(Protocol):
    """Packs tensors for one receiver, who takes them out."""

    def pack(self, tensors: Mapping[str, Tensor]) -> Parcel:
        """A parcel with copies of the tensors, or the tensors themselves."""

    def take(self, parcel: Parcel) -> Mapping[str, Tensor]:
        """The tensors of a parcel, which is freed. Raises ParcelGone."""

    def free(self, parcel: Parcel) -> None:
        """Give back the memory of a parcel nobody will take; one that is gone is no error."""


class LocalTransport:
    """For engines in one process: parcels hold the tensors themselves."""

    def pack(self, tensors: Mapping[str, Tensor]) -> Parcel:
        return LocalParcel(dict(tensors))

    def take(self, parcel: Parcel) -> Mapping[str, Tensor]:
        assert isinstance(parcel, LocalParcel)
        return parcel.tensors

    def free(self, parcel: Parcel) -> None:
        """Nothing to do: the last reference frees the tensors."""


class SharedTransport:
    """For engines in processes of their own: one copy into shared memory, none out of it."""

    def pack(self, tensors: Mapping[str, Tensor]) -> Parcel:
        places: dict[str, Place] = {}
        end = 0
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            places[name] = Place(end, tuple(tensor.shape), dtype)
            end += -(-places[name].bytes // ALIGNMENT) * ALIGNMENT
        memory = SharedMemory(create=True, size=max(1, end))
        views = _views(memory, places)
        for name, tensor in tensors.items():
            views[name].copy_(tensor)
        del views
        memory.close()
        return SharedParcel(memory.name, places)

    def take(self, parcel: Parcel) -> Mapping[str, Tensor]:
        assert isinstance(parcel, SharedParcel)
        try:
            memory = SharedMemory(parcel.memory)
        except FileNotFoundError as error:
            raise ParcelGone(f"the tensors {', '.join(parcel.places)} are gone") from error
        views = _views(memory, parcel.places)
        found = {name: view.clone() for name, view in views.items()}
        del views
        memory.close()
        memory.unlink()
        return found

    def free(self, parcel: Parcel) -> None:
        assert isinstance(parcel, SharedParcel)
        with suppress(FileNotFoundError):
            memory = SharedMemory(parcel.memory)
            memory.close()
            memory.unlink()


def _views(memory: SharedMemory, places: Mapping[str, Place]) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(
            memory.buf,
            dtype=getattr(torch, place.dtype),
            count=math.prod(place.shape),
            offset=place.offset,
        ).view(place.shape)
        if place.bytes
        else torch.empty(place.shape, dtype=getattr(torch, place.dtype))
        for name, place in places.items()
    }
