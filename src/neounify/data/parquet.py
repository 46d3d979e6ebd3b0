"""Parquet tables of records, with the bytes of images in their cells or the paths of files.

A row is a record of any form, its columns are the fields. An image is the bytes of a file, a
struct of `bytes` and `path` (as Hugging Face writes it), or a path. Rows are read by row groups,
which stay in memory while a mixture draws from them; what a file claims about itself is checked
against bounds before, and again while it is read.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass as config_dataclass

from neounify.config.ranges import STRICT
from neounify.data.configs import RecordData
from neounify.data.media import Blobs, Unread
from neounify.data.sample import DataError
from neounify.data.sources import GROUPS_TOGETHER, RecordSource, data_files
from neounify.errors import missing_extra

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_COLUMNS, MAX_DEPTH = 1000, 8
MAX_GROUP_BYTES = 2**30
"""Size of a row group in memory; up to `GROUPS_TOGETHER` of them are there at a time."""
MAX_FOOTER_BYTES = 64 * 2**20
"""Size of the longest string and of all parts of a footer, as the file's reader counts them."""
BATCH_ROWS = 32
"""Rows that are decoded before the size of a group is checked again."""


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class ParquetData(RecordData):
    """`kind = "parquet"`: a file, or all .parquet files below a folder."""

    kind: Literal["parquet"] = "parquet"

    def build(self) -> ParquetSource:
        return ParquetSource.of(self)


class ParquetSource(RecordSource):
    """Rows of one .parquet file, or of all below a folder in order of their names.

    A file that cannot be read at all is listed in `damage`. Raises DataError without pyarrow.
    """

    def _index(self, path: Path) -> None:
        _pyarrow()
        self.files = data_files(path, ".parquet", "parquet")
        groups: list[tuple[int, int, int]] = []
        for number, file in enumerate(self.files):
            try:
                with _opened(file) as table:
                    _check_schema(table.schema_arrow)
                    rows = [
                        table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)
                    ]
            except DataError as error:
                self.damage.append(f"{file.name}: {error}")
                continue
            groups += [(number, n, count) for n, count in enumerate(rows) if count > 0]
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._starts = np.concatenate([[0], np.cumsum(self._groups[:, 2])])
        self.groups = [int(count) for count in self._groups[:, 2]]
        self._loaded: OrderedDict[int, list[pa.RecordBatch]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": OrderedDict()}

    @property
    def size(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[Path, int, int]:
        """File, number among all groups, and row in the group of a sample."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.files[self._groups[group][0]], group, index - int(self._starts[group])

    def _row(self, index: int) -> int:
        """The row of a sample in its file, from 1."""
        _, group, row = self._place(index)
        same = self._groups[:group][self._groups[:group, 0] == self._groups[group][0]]
        return int(same[:, 2].sum()) + row + 1

    def location(self, index: int) -> str:
        """File and row of a sample, from 1."""
        return f"{self._place(index)[0].name}, row {self._row(index)}"

    def record(self, index: int) -> tuple[dict[str, Any], Blobs]:
        """One row as a record, whose images in bytes are names of the second. Raises DataError."""
        _, group, row = self._place(index)
        for batch in self._group(group):
            if row < batch.num_rows:
                blobs: Blobs = {}
                (values,) = batch.slice(row, 1).to_pylist()
                return {name: _named(value, blobs, 0) for name, value in values.items()}, blobs
            row -= batch.num_rows
        raise DataError("the row group has fewer rows than the file claims")

    def _group(self, number: int) -> list[pa.RecordBatch]:
        """The rows of a group, of which the last few read are kept."""
        if number not in self._loaded:
            while len(self._loaded) >= GROUPS_TOGETHER:
                self._loaded.popitem(last=False)
            self._loaded[number] = self._read(number)
        self._loaded.move_to_end(number)
        return self._loaded[number]

    def _read(self, number: int) -> list[pa.RecordBatch]:
        file, inside, _ = self.files[self._groups[number][0]], int(self._groups[number][1]), 0
        batches: list[pa.RecordBatch] = []
        size = 0
        with _opened(file) as table:
            _check_size(table.metadata.row_group(inside).total_byte_size, inside)
            names = [n for n in table.schema_arrow.names if n not in self.rules.ignored]
            for batch in table.iter_batches(BATCH_ROWS, row_groups=[inside], columns=names):
                size += batch.nbytes
                _check_size(size, inside)
                batches.append(batch)
        return batches

    def _unread(self, index: int) -> Unread:
        (record, blobs), file = self.record(index), self._place(index)[0]
        return self._from_record(record, blobs, file, self._row(index))


def _named(value: Any, blobs: Blobs, depth: int) -> Any:
    """A cell with names in place of bytes, which go into `blobs`."""
    if depth > MAX_DEPTH:
        raise DataError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, bytes):
        name = f"bytes-{len(blobs)}"
        blobs[name] = value
        return name
    if isinstance(value, list):
        return [_named(item, blobs, depth + 1) for item in value]
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:
            content = value["bytes"]
            return _named(value["path"] if content is None else content, blobs, depth + 1)
        return {name: _named(item, blobs, depth + 1) for name, item in value.items()}
    return value


def _pyarrow() -> None:
    """Raise DataError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(missing_extra("Parquet tables", "parquet", error)) from error


@contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    """A file with bounds on its footer. Raises DataError for one that is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(
            file,
            memory_map=False,
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            thrift_container_size_limit=MAX_FOOTER_BYTES,
        ) as table:
            yield table
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError, RecursionError) as error:
        text = " ".join(str(error).split())[:200]
        raise DataError(f"a damaged or unreadable Parquet table ({text})") from error


def captions_by_key(file: Path) -> dict[str, str]:
    """Captions by key of a table that img2dataset writes; none without these columns.

    Raises DataError, also without pyarrow.
    """
    _pyarrow()
    import pyarrow as pa

    captions: dict[str, str] = {}
    with _opened(file) as table:
        _check_schema(table.schema_arrow)
        if any(table.schema_arrow.get_field_index(name) < 0 for name in ("key", "caption")):
            return captions
        size = 0
        for batch in table.iter_batches(BATCH_ROWS * BATCH_ROWS, columns=["key", "caption"]):
            size += batch.nbytes
            _check_size(size, 0)
            if all(pa.types.is_string(column.type) for column in batch.columns):
                pairs = zip(*(column.to_pylist() for column in batch.columns), strict=True)
                captions.update((key, text) for key, text in pairs if key and text)
    return captions


def count_statuses(files: Sequence[Path]) -> Counter[str]:
    """Rows by status of the tables that img2dataset writes beside its shards.

    A table without that column counts nothing. Raises DataError, also without pyarrow.
    """
    if not files:
        return Counter()
    _pyarrow()
    import pyarrow as pa

    counts: Counter[str] = Counter()
    for file in files:
        with _opened(file) as table:
            _check_schema(table.schema_arrow)
            if table.schema_arrow.get_field_index("status") < 0:
                continue
            for batch in table.iter_batches(BATCH_ROWS * BATCH_ROWS, columns=["status"]):
                column = batch.column(0)
                if pa.types.is_string(column.type):
                    counts.update(str(value)[:40] for value in column.to_pylist())
    return counts


def _check_schema(schema: pa.Schema) -> None:
    """Raise DataError for a table with too many columns, or too deep ones."""

    if len(schema) > MAX_COLUMNS:
        raise DataError(f"{len(schema):,} columns, at most {MAX_COLUMNS:,} are read")
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise DataError(f"the column {twice[0][:40]!r} is there twice")
    layer: list[tuple[str, pa.DataType]] = [(field.name, field.type) for field in schema]
    for _ in range(MAX_DEPTH):
        layer = [(name, kind.field(n).type) for name, kind in layer for n in range(kind.num_fields)]
        if len(layer) > MAX_COLUMNS:
            raise DataError(f"columns of more than {MAX_COLUMNS:,} parts")
    if layer:
        raise DataError(f"the column {layer[0][0][:40]!r} is nested more than {MAX_DEPTH} deep")


def _check_size(size: int, group: int) -> None:
    if not 0 <= size <= MAX_GROUP_BYTES:
        raise DataError(
            f"row group {group + 1} has {size:,} bytes in memory, at most {MAX_GROUP_BYTES:,} are "
            "read; write the table with smaller row groups (row_group_size of pyarrow)",
            "a row group is too large",
        )
