"""Tensor references of commands and replies, and the transports that pack and take them.

A reference has one receiver, which takes the tensors out once. It belongs to the caller of the
engines from the moment the caller packs or receives it: references not taken when a call ends are
freed there, no matter which side packed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from neounify.cache import SequenceCache
from neounify.errors import TensorsGone


class TensorRef(Protocol):
    """Tensors by name, for one receiver."""

    def free(self) -> None:
        """Free tensors that will not be taken; calling it again is no error."""


@dataclass(frozen=True, eq=False)
class LocalTensors:
    """Tensors by name in this process; empty once taken."""

    tensors: dict[str, Tensor]

    def free(self) -> None:
        self.tensors.clear()


@dataclass(frozen=True, eq=False)
class LocalCache:
    """KV cache of a sequence in this process, read in place without a copy."""

    cache: SequenceCache

    def free(self) -> None:
        """Does nothing: the cache is freed with its last reference."""


class Transport(Protocol):
    """Packs tensors for one receiver, which takes them out.

    `copies`: whether packing copies the tensors, in time proportional to their size.
    """

    copies: bool

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        """A reference to copies of the tensors, or to themselves. Raises OutOfMemory."""

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        """The tensors of a reference, which is freed. Raises TensorsGone."""


class LocalTransport:
    """Transport within one process: references hold the tensors themselves."""

    copies = False

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        return LocalTensors(dict(tensors))

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        assert isinstance(ref, LocalTensors)
        tensors = dict(ref.tensors)
        ref.tensors.clear()
        if not tensors:
            raise TensorsGone("the tensors of the request were given up or taken before")
        return tensors
