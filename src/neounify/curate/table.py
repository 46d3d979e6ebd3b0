"""The parquet table of a curation: one row for every input sample, in input order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from neounify.curate.images import ImageRow
from neounify.curate.parts import arrow
from neounify.curate.texts import TextRow

if TYPE_CHECKING:
    import pyarrow as pa


MAX_DETAIL_CHARACTERS = 300


@dataclass
class Row:
    """One input sample: where it stands, what was measured, and the reason why it is dropped.

    Of a sample that is known to be bad nothing but its place and reason are written.
    """

    id: str
    source: str
    location: str
    task: str | None = None
    reason: str | None = None
    detail: str | None = None
    images: list[ImageRow] = field(default_factory=list)
    text: TextRow | None = None

    def values(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)

    def blank(self, reason: str) -> None:
        """Leave nothing but the place and the reason."""
        self.reason, self.detail, self.images, self.text = reason, None, [], None


def measured_schema() -> pa.Schema:
    """Columns of the measuring pass."""
    pa = arrow()
    image = {
        "role": pa.string(),
        "file_bytes": pa.int64(),
        "sha256": pa.string(),
        "format": pa.string(),
        "mode": pa.string(),
        "frames": pa.int32(),
        "width": pa.int32(),
        "height": pa.int32(),
        "sharpness": pa.float64(),
        "entropy": pa.float64(),
        "luma": pa.float64(),
        "border": pa.float64(),
        "pixels_sha256": pa.string(),
        "hash": pa.binary(),
        "hash_quality": pa.int16(),
    }
    text = {
        "characters": pa.int64(),
        "words": pa.int64(),
        "language": pa.string(),
        "repetition": pa.float64(),
        "urls": pa.int64(),
        "file_name": pa.bool_(),
        "signature": pa.binary(),
    }
    fields = {
        "id": pa.string(),
        "source": pa.string(),
        "location": pa.string(),
        "task": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "images": pa.list_(pa.struct(list(image.items()))),
        "text": pa.struct(list(text.items())),
    }
    return pa.schema(list(fields.items()))


def measured_table(rows: Iterable[Row]) -> pa.Table:
    """The rows of a unit as a table."""
    return arrow().Table.from_pylist([row.values() for row in rows], schema=measured_schema())


SCORES = ("safety", "watermark", "beauty", "match")
"""Columns of hooks, one value for each image that they looked at."""


def final_schema() -> pa.Schema:
    """Columns of the table of a curation."""
    pa = arrow()
    schema = measured_schema()
    number = pa.float64()
    extra = {
        "verdict": pa.string(),
        "copy_of": pa.string(),
        "distance": number,
        "safety": pa.list_(pa.map_(pa.string(), number)),
        "watermark": pa.list_(number),
        "beauty": pa.list_(number),
        "match": pa.list_(number),
        "captions": pa.list_(
            pa.struct([("text", pa.string()), ("kind", pa.string()), ("score", number)])
        ),
        "caption": pa.string(),
        "shard": pa.string(),
        "key": pa.string(),
    }
    for name, kind in extra.items():
        schema = schema.append(pa.field(name, kind))
    return schema
