"""Samples of the published schema from JSON lines, by number."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from neounify.data.formats import files_below, foreign_folder, foreign_lines
from neounify.data.pictures import with_pictures
from neounify.data.record import parse_json, sample_from_record
from neounify.data.sample import DataError, Sample

MAX_LINE_BYTES = 16 * 2**20


class JsonlSource:
    """One .jsonl file, or all below a folder in order of their names.

    Only the places of the lines are kept in memory. Paths of images are relative to `root`, by
    default each file's folder, and must stay below it, links followed. `task` overrides the
    records' own; fields of records in `ignored` are not read; `colour_profiles` is that of
    `read_image`. Raises DataError when there is nothing to read, or the files are of another form
    than JSON lines.
    """

    def __init__(
        self,
        path: Path,
        *,
        root: Path | None = None,
        task: str | None = None,
        ignored: Collection[str] = (),
        colour_profiles: bool = True,
    ) -> None:
        self.files = _files(path)
        if root is not None and not root.is_dir():
            raise DataError(f"the folder of images {root} is not there")
        self.root, self.task, self.ignored = root, task, tuple(ignored)
        self.colour_profiles = colour_profiles
        self.name = path.name or str(path)
        self.damage: list[str] = []
        places = [_places(file) for file in self.files]
        self._places = np.concatenate(places) if places else np.zeros((0, 3), np.int64)
        numbers = [np.full(len(found), n) for n, found in enumerate(places)]
        self._file_of = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
        if not len(self._places):
            raise DataError(f"the data {path} holds no line to learn from")

    @property
    def size(self) -> int:
        return len(self._places)

    def place(self, index: int) -> str:
        """The file and line of a sample."""
        return f"{self.files[self._file_of[index]].name}, line {self._places[index][2]}"

    def __getitem__(self, index: int) -> Sample:
        """Read one line and its images. Raises DataError that names the line."""
        file = self.files[self._file_of[index]]
        start, length, number = (int(value) for value in self._places[index])
        where = self.place(index)
        if length > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
        try:
            # Opened anew each time: worker processes must not share a place in the file.
            with file.open("rb") as stream:
                stream.seek(start)
                record = parse_json(stream.read(length))
            root = self.root or file.parent
            sample = sample_from_record(record, root, self.task, self.ignored)
            sample = with_pictures(sample, root, colour_profiles=self.colour_profiles)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: {error}") from error
        return sample if sample.id else replace(sample, id=f"{file.stem}-{number}")


def _files(path: Path) -> list[Path]:
    """The files to read. Raises DataError for what is not there or not JSON lines."""
    try:
        if not path.exists():
            raise DataError(f"the data {path} is not there")
        if not path.is_dir() and not path.is_file():
            raise DataError(f"the data {path} is neither a file nor a folder")
        files = [path]
        if path.is_dir():
            files = files_below(path, ".jsonl")
        if not files:
            raise DataError(f"the data {path} {foreign_folder(path)}")
        for file in files:
            if what := foreign_lines(file):
                raise DataError(f"the data {file} {what}")
    except OSError as error:
        raise DataError(f"the data {path} cannot be read: {error}") from error
    return files


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
