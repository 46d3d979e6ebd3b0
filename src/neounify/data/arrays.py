"""One JSON array of records, as LLaVA and LLaMA-Factory write it, read record by record.

An array may be larger than the memory: one pass over its bytes finds where each record begins and
ends, and a record is parsed when it is drawn. Brackets and quotes are counted as simdjson does
(Langdale and Lemire 2019): a quote is escaped by an odd run of backslashes before it, and a byte is
in a string where the number of other quotes before it is odd.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass as config_dataclass

from neounify.config.ranges import STRICT
from neounify.data.configs import RecordData
from neounify.data.sample import DataError
from neounify.data.sources import MAX_RECORDS, RecordFiles, Spans, data_files

CHUNK_BYTES = 2**20
_OPENING, _CLOSING, _SPACE = b"[{", b"]}", b" \t\r\n"
_QUOTE, _BACKSLASH, _COMMA = b'"'[0], b"\\"[0], b","[0]

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class JsonData(RecordData):
    """`kind = "json"`: a file that is one JSON array of records, or all below a folder."""

    kind: Literal["json"] = "json"

    def build(self) -> JsonSource:
        return JsonSource.of(self)


class JsonSource(RecordFiles):
    """One .json file with an array of records, or all below a folder."""

    place = "record"

    def files_of(self, path: Path) -> list[Path]:
        return data_files(path, ".json", "json")

    def spans_of(self, file: Path) -> Spans:
        scanner = _Scanner()
        first = 0
        with file.open("rb") as stream:
            if stream.read(3) != b"\xef\xbb\xbf":
                stream.seek(0)
            else:
                first = 3
            try:
                while chunk := stream.read(CHUNK_BYTES):
                    scanner.add(np.frombuffer(chunk, np.uint8))
                scanner.end()
            except DataError as error:
                # Records before the fault can be read.
                self.damage.append(f"{file.name}: {error}")
        count = len(scanner.ends)
        starts = np.frombuffer(scanner.starts, np.int64)[:count]
        lengths = np.frombuffer(scanner.ends, np.int64) - starts
        return np.stack([starts + first, lengths, np.arange(1, count + 1)], axis=1)


class _Scanner:
    """Starts and ends of the elements of an array, from its bytes in pieces."""

    def __init__(self) -> None:
        self.starts, self.ends = array("q"), array("q")
        self.position = self.depth = self.arrays = 0
        self.in_string = self.escaped = False

    def add(self, chunk: Bytes) -> None:
        """Take the next bytes. Raises DataError for those that no array of records has."""
        quotes = chunk == _QUOTE
        quotes &= ~self._escaped(chunk)
        odd = (np.cumsum(quotes) + self.in_string) % 2 == 1
        self.in_string = bool(odd[-1])
        outside = ~odd & ~quotes
        opening, closing = _among(chunk, _OPENING) & outside, _among(chunk, _CLOSING) & outside
        depth = self.depth + np.cumsum(opening.astype(np.int64) - closing)
        self.depth = int(depth[-1])
        between = outside & ~_among(chunk, _SPACE)
        stray = between & ~opening & ~closing & (chunk != _COMMA) & (depth == 1)
        stray |= quotes & (depth == 1)
        stray |= (between | quotes) & ~closing & (depth <= 0)
        stray |= depth < 0
        arrays = self.arrays + np.cumsum(opening & (depth == 1))
        self.arrays = int(arrays[-1])
        stray |= arrays > 1
        fault = int(np.argmax(stray)) if stray.any() else len(chunk)
        self.starts.extend((np.flatnonzero(opening[:fault] & (depth[:fault] == 2))) + self.position)
        ends = np.flatnonzero(closing[:fault] & (depth[:fault] == 1)) + self.position + 1
        self.ends.extend(ends)
        if fault < len(chunk):
            what = (
                "the end of the array"
                if depth[fault] <= 0 or arrays[fault] > 1
                else f"record {len(self.ends)}"
            )
            byte = bytes(chunk[fault : fault + 1]).decode("latin-1")
            raise DataError(
                f"{byte!r} at byte {self.position + fault:,}, after {what}, where only records "
                "can be; an array of JSON objects is read"
            )
        if len(self.ends) > MAX_RECORDS:
            raise DataError(f"more than {MAX_RECORDS:,} records")
        self.position += len(chunk)

    def end(self) -> None:
        """The end of the file. Raises DataError if that of the array has not come."""
        if self.depth > 0 or self.in_string:
            raise DataError(f"cut off after record {len(self.ends)}: the array has no end")

    def _escaped(self, chunk: Bytes) -> Mask:
        """Bytes with an odd run of backslashes before them."""
        backslash = chunk == _BACKSLASH
        if not self.escaped and not backslash.any():
            return np.zeros(len(chunk), np.bool_)
        # An open run of the chunk before counts as one backslash more.
        run = np.concatenate([[self.escaped], backslash])
        index = np.arange(len(run))
        last_other = np.maximum.accumulate(np.where(run, -1, index))
        odd = run & ((index - last_other) % 2 == 1)
        self.escaped = bool(odd[-1])
        return odd[:-1]


def _among(chunk: Bytes, values: bytes) -> Mask:
    mask = chunk == values[0]
    for value in values[1:]:
        mask |= chunk == value
    return mask
