"""Tables of records in CSV: metadata.csv of image folders, and other tables with a header.

The first row names the fields. A row may span lines inside quotes. Rows are found once by their
offsets, and parsed when they are drawn.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass as config_dataclass

from neounify.config.ranges import STRICT
from neounify.data.configs import RecordData
from neounify.data.formats import named
from neounify.data.sample import DataError
from neounify.data.sources import MAX_LINE_BYTES, MAX_RECORDS, RecordFiles, Spans, data_files

MAX_COLUMNS = 1000


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class CsvData(RecordData):
    """`kind = "csv"`: a .csv file, a .tsv file with tabs, or all .csv files below a folder."""

    kind: Literal["csv"] = "csv"

    def build(self) -> CsvSource:
        return CsvSource.of(self)


class CsvSource(RecordFiles):
    """One .csv or .tsv file, or all .csv files below a folder."""

    place = "line"

    def files_of(self, path: Path) -> list[Path]:
        self.headers: dict[Path, list[str]] = {}
        return data_files(path, ".csv", "csv")

    def spans_of(self, file: Path) -> Spans:
        spans = array("q")
        with file.open("rb") as stream:
            lines = _Lines(stream)
            # Bytes of UTF-8 beyond ASCII are none of the characters that divide a table.
            rows = csv.reader(lines, strict=True, delimiter=_delimiter(file))
            start = line = 0
            try:
                for number, row in enumerate(rows):
                    if number == 0:
                        self.headers[file] = _header(row)
                    elif row:
                        spans.extend((start, lines.position - start, line + 1))
                    if number > MAX_RECORDS:
                        raise DataError(f"more than {MAX_RECORDS:,} rows")
                    start, line = lines.position, lines.number
            except (csv.Error, DataError) as error:
                if file not in self.headers:
                    raise DataError(f"{file.name}: {error}") from error
                self.damage.append(f"{file.name}, line {line + 1}: {error}; rows before are read")
        return np.frombuffer(spans, np.int64).reshape(-1, 3)

    def parse(self, file: Path, content: bytes) -> dict[str, Any]:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8 text; convert it (iconv -t UTF-8)") from error
        rows = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_delimiter(file))
        (row,), header = list(rows), self.headers[file]
        if len(row) != len(header):
            raise DataError(
                f"{len(row)} values, but {len(header)} columns ({named(header)}); put values with "
                "commas or line ends in quotes"
            )
        return dict(zip(header, row, strict=True))


class _Lines:
    """Lines of a stream for csv, with the bytes and lines that were read so far."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.position, self.number = stream, 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"longer than {MAX_LINE_BYTES} bytes")
        self.position += len(line)
        self.number += 1
        return line.decode("latin-1")


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _header(row: list[str]) -> list[str]:
    """Names of columns. Raises DataError for names that are empty or there twice."""
    if len(row) > MAX_COLUMNS:
        raise DataError(f"{len(row):,} columns, at most {MAX_COLUMNS:,} are read")
    try:
        names = "\0".join(row).encode("latin-1").decode("utf-8-sig").split("\0")
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text; convert it (iconv -t UTF-8)") from error
    names = [name.strip() for name in names]
    twice = [name for name in names if names.count(name) > 1]
    if twice or "" in names:
        wrong = f"the column {twice[0][:40]!r} twice" if twice else "a column without a name"
        raise DataError(f"the first row must name every column once; it has {wrong}")
    return names
