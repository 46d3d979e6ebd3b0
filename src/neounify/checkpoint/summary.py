"""Summary of a checkpoint: tensors, parameters and bytes per stream, part and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from neounify.checkpoint.names import from_published, part_of, stream_of
from neounify.checkpoint.reader import CheckpointFolder

STREAMS = ("und", "gen", "shared", "unknown")


@dataclass(frozen=True)
class SummaryRow:
    """All tensors of one part of one stream in one dtype; `bytes` as stored."""

    stream: str
    part: str
    dtype: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """Rows in order of stream and part; tensors that fit no model are of the stream "unknown"."""

    rows: tuple[SummaryRow, ...]

    def of_stream(self, stream: str) -> SummaryRow:
        """The sum of one stream's rows; part and dtype say which ones went in."""
        return _total(stream, [row for row in self.rows if row.stream == stream])

    @property
    def streams(self) -> tuple[SummaryRow, ...]:
        """One sum per stream that has rows."""
        present = {row.stream for row in self.rows}
        return tuple(self.of_stream(stream) for stream in STREAMS if stream in present)

    @property
    def total(self) -> SummaryRow:
        """The sum of all rows."""
        return _total("all", self.rows)


def summarise(checkpoint: CheckpointFolder) -> Summary:
    """Tensors, parameters and bytes of a checkpoint folder; reads headers only."""
    sums: dict[tuple[int, str, str], list[int]] = {}
    for published, info in checkpoint.tensors.items():
        name = from_published(published)
        stream = "unknown" if name is None else stream_of(name)
        part = "unknown" if name is None else part_of(name)
        key = (STREAMS.index(stream), part, str(info.dtype).removeprefix("torch."))
        row = sums.setdefault(key, [0, 0, 0])
        row[0] += 1
        row[1] += info.numel
        row[2] += info.numel * info.dtype.itemsize
    return Summary(
        tuple(
            SummaryRow(STREAMS[stream], part, dtype, *sums[stream, part, dtype])
            for stream, part, dtype in sorted(sums)
        )
    )


def _total(stream: str, rows: Iterable[SummaryRow]) -> SummaryRow:
    rows = list(rows)
    dtypes = sorted({row.dtype for row in rows})
    return SummaryRow(
        stream=stream,
        part="all",
        dtype=", ".join(dtypes),
        tensors=sum(row.tensors for row in rows),
        parameters=sum(row.parameters for row in rows),
        bytes=sum(row.bytes for row in rows),
    )
