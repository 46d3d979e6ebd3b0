"""References to tensors in commands and replies, and how tensors get into and out of them.

A reference is for one receiver, who takes the tensors out once. It belongs to the caller of the
engines from the moment it packs it or receives it: what was not taken when a call ends is freed
there, no matter which side packed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from neounify.cache import SequenceCache
from neounify.errors import TensorsGone


class TensorRef(Protocol):
    """Tensors by name that a receiver will take."""

    def free(self) -> None:
        """Give back the memory of tensors nobody will take; those that are gone are no error."""


@dataclass(frozen=True, eq=False)
class LocalTensors:
    """Tensors by name, in this process; none once they were taken."""

    tensors: dict[str, Tensor]

    def free(self) -> None:
        self.tensors.clear()


@dataclass(frozen=True, eq=False)
class LocalCache:
    """The cache of a sequence in this process, to be read where it is; nothing is copied."""

    cache: SequenceCache

    def free(self) -> None:
        """Does nothing: the cache is freed with the last one that holds it."""


class Transport(Protocol):
    """Packs tensors for one receiver, who takes them out.

    `copies`: whether that copies them, which takes as long as they are large.
    """

    copies: bool

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        """A reference to copies of the tensors, or to themselves. Raises OutOfMemory."""

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        """The tensors of a reference, which is freed. Raises TensorsGone."""


class LocalTransport:
    """For engines in one process: references hold the tensors themselves."""

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
