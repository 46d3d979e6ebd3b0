"""Samples of the published schema from JSON lines, by number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from neounify.data.pictures import with_pictures
from neounify.data.sample import DataError, Sample, sample_from_record

MAX_LINE_BYTES = 16 * 2**20


class JsonlSource:
    """One .jsonl file, or all below a folder in order of their names.

    Only the places of the lines are kept in memory. Paths of pictures are relative to `root`, by
    default each file's folder, and must stay below it. `task` overrides the records' own,
    `colour_profiles` is that of `read_image`.
    Raises DataError when there is nothing to read.
    """

    def __init__(
        self,
        path: Path,
        *,
        root: Path | None = None,
        task: str | None = None,
        colour_profiles: bool = True,
    ) -> None:
        if not path.exists():
            raise DataError(f"the data {path} is not there")
        self.files = _below(path) if path.is_dir() else [path]
        self.root, self.task, self.colour_profiles = root, task, colour_profiles
        places = [_places(file) for file in self.files]
        self._places = np.concatenate(places) if places else np.zeros((0, 3), np.int64)
        numbers = [np.full(len(found), n) for n, found in enumerate(places)]
        self._file_of = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
        if not len(self._places):
            raise DataError(f"the data {path} holds no line to learn from")

    @property
    def size(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """Read one line and its pictures. Raises DataError that names the line."""
        file = self.files[self._file_of[index]]
        start, length, number = (int(value) for value in self._places[index])
        where = f"{file.name}, line {number}"
        if length > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
        try:
            # Opened anew each time: worker processes must not share a place in the file.
            with file.open("rb") as stream:
                stream.seek(start)
                record = json.loads(stream.read(length))
            root = self.root or file.parent
            sample = sample_from_record(record, root, self.task)
            sample = with_pictures(sample, root, colour_profiles=self.colour_profiles)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: {error}") from error
        return sample if sample.id else replace(sample, id=f"{file.stem}-{number}")


def _below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".jsonl")


def _places(file: Path) -> np.ndarray:
    """(first byte, bytes, line number from 1) of every line that is not blank, [n, 3]."""
    found = []
    start = 0
    with file.open("rb") as stream:
        number = 1
        # Bounded reads: a file without line ends must not fill the memory.
        length, blank = 0, True
        while piece := stream.readline(2**20):
            length += len(piece)
            blank = blank and not piece.strip()
            if piece.endswith(b"\n"):
                if not blank:
                    found.append((start, length, number))
                start, length, blank, number = start + length, 0, True, number + 1
        if length and not blank:
            found.append((start, length, number))
    return np.array(found, np.int64).reshape(-1, 3)
