"""What training data comes from: samples by number."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from neounify.data.sample import Sample


@runtime_checkable
class Source(Protocol):
    """Samples by number, so that a position is one integer and resuming is exact.

    `size` is the number of samples; None for a source without end. An index always gives the
    same sample, in any process. A damaged sample raises DataError, which the loader counts.
    """

    @property
    def size(self) -> int | None: ...

    def __getitem__(self, index: int) -> Sample: ...
