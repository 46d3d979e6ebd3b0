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


@runtime_checkable
class FileSource(Source, Protocol):
    """Samples of files. `damage` lists what could not be indexed, one message each."""

    name: str
    damage: list[str]

    def place(self, index: int) -> str:
        """Where a sample stands, such as "train.jsonl, line 7"."""
        ...


def source_name(source: Source) -> str:
    """The name of a source for messages."""
    return source.name if isinstance(source, FileSource) else type(source).__name__


def sample_place(source: Source, index: int) -> str:
    """Where a sample of a source stands, for messages."""
    return source.place(index) if isinstance(source, FileSource) else f"sample {index}"
