"""What attention needs of caches: one per document, or many read side by side."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class KeyValues(Protocol):
    """One document's cache."""

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put the keys and values [N, kv_heads, d] of new tokens after the cached ones."""

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, length, d] of the first `length` tokens, new ones included."""


@runtime_checkable
class TokenBatch(Protocol):
    """Caches of B sequences that take one token each and are read side by side."""

    def write_tokens(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put one new key and value [B, kv_heads, d] behind every sequence."""

    def padded(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, kv_heads, n, d] with the new ones, and which are real [B, n]."""


@runtime_checkable
class NoiseBatch(Protocol):
    """Caches that B noisy images of at most `longest` tokens look at, read side by side.

    `slots` says where in [B · longest] each token of the packed images stands.
    """

    longest: int
    slots: Int[Tensor, " g"]

    def with_images(
        self, layer: int, k: Float[Tensor, "g kv d"], v: Float[Tensor, "g kv d"]
    ) -> tuple[Float[Tensor, "b kv n d"], Float[Tensor, "b kv n d"], Bool[Tensor, "b n"]]:
        """What each image sees, itself included, and which of it is real."""


Caches = Sequence[KeyValues] | TokenBatch | NoiseBatch
"""One per document, or many of them side by side."""
