"""Sample sources: protocol, sources of files, mixtures by weight, JSON lines.

A new format is a file with a source and its `DataConfig`, and a line in `FORMATS` of `configs.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass as config_dataclass
from typing_extensions import Self

from neounify.config.ranges import STRICT
from neounify.data.configs import RecordData
from neounify.data.formats import files_below, recognise
from neounify.data.media import Blobs, Unread, blob_or_file
from neounify.data.reasons import reason_of
from neounify.data.records import RecordRules, parse_record, sample_from_record
from neounify.data.sample import DataError, Sample


@runtime_checkable
class SampleSource(Protocol):
    """Samples by number, so that a position is one integer and resuming is exact.

    `size` is the number of samples; None for a source without end. An index always gives the
    same sample, in any process. A damaged sample raises DataError, which the loader counts.
    """

    @property
    def size(self) -> int | None: ...

    def __getitem__(self, index: int) -> Sample: ...


class EndlessSource(ABC):
    """Samples without end: `source[i]` for any i ≥ 0. It has no length on purpose."""

    size = None

    @abstractmethod
    def draw(self, index: int) -> Sample:
        """The sample of an index, at least 0."""

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise DataError(f"sample {index}: an endless data set has no last sample")
        return self.draw(index)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.draw, count())


class FileSource(ABC):
    """Samples of files, by number; a kind of file is a subclass.

    `name` is for messages; `files` are those that its samples are read from, without images beside
    them, and none for a folder of images; `damage` lists files or parts of files that could not be
    indexed, one message each. `rules` are those of its records. `groups` are sizes of parts that
    lie together and are costly to read, in order, where there are any: a mixture draws from a few
    at a time. `colour_profiles` is that of `read_image`.
    """

    name: str
    files: list[Path]
    damage: list[str]
    rules: RecordRules
    groups: Sequence[int] | None = None
    colour_profiles: bool = True

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of samples."""

    @abstractmethod
    def location(self, index: int) -> str:
        """Location of a sample, such as "train.jsonl, line 7"."""

    @abstractmethod
    def _unread(self, index: int) -> Unread: ...

    def unread(self, index: int) -> Unread:
        """A sample without its images. Raises DataError that names its location."""
        with self._located(index):
            return self._unread(index)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample and its images. Raises DataError that names its location."""
        with self._located(index):
            return self._unread(index).read(colour_profiles=self.colour_profiles)

    @contextmanager
    def _located(self, index: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RecursionError, OverflowError) as error:
            raise DataError(f"{self.location(index)}: {error}", reason_of(error)) from error


def source_name(source: SampleSource) -> str:
    """The name of a source for messages."""
    return source.name if isinstance(source, FileSource) else type(source).__name__


def sample_location(source: SampleSource, index: int) -> str:
    """Location of a sample, for messages."""
    return source.location(index) if isinstance(source, FileSource) else f"sample {index}"


BLOCK = 1024
"""Draws that hold every source in exact proportion."""


class Mixture:
    """Draws come in blocks of `BLOCK`; each holds every source as often as its weight says.

    The n-th draw of a finite source is sample permutation(epoch)[n mod size]: every epoch takes
    each sample once, in a new order. Draws of an endless source are its samples in order.
    Raises DataError for wrong weights.
    """

    size = None

    def __init__(self, parts: Sequence[tuple[SampleSource, float]], seed: int) -> None:
        weights = [weight for _, weight in parts]
        if not parts or not all(0 < weight < float("inf") for weight in weights):
            raise DataError(f"a mixture needs sources with weights above 0, got {weights}")
        if len(parts) > BLOCK // 2:
            raise DataError(f"{len(parts)} sources are more than a block of {BLOCK} can hold")
        self.sources = [source for source, _ in parts]
        self.seed = seed
        self.counts = _shares(weights)
        self._order = lru_cache(maxsize=4)(self._block)
        self._epochs = lru_cache(maxsize=8)(self._permutation)

    def __getitem__(self, index: int) -> Sample:
        source, number = self.describe(index)
        return self.sources[source][number]

    def describe(self, index: int) -> tuple[int, int]:
        """(source, sample in it) that a draw takes."""
        if index < 0:
            raise DataError(f"sample {index}: a mixture has no last sample")
        block, offset = divmod(index, BLOCK)
        order = self._order(block)
        source = int(order[offset])
        nth = block * self.counts[source] + int((order[:offset] == source).sum())
        size = self.sources[source].size
        if size is None:
            return source, nth
        epoch, offset = divmod(nth, size)
        return source, int(self._epochs(source, epoch)[offset])

    def _block(self, block: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, 0, block))
        return rng.permutation(np.repeat(np.arange(len(self.counts)), self.counts))

    def _permutation(self, source: int, epoch: int) -> NDArray[np.int64]:
        content = self.sources[source]
        assert content.size is not None
        rng = np.random.default_rng((self.seed, 1, source, epoch))
        groups = content.groups if isinstance(content, FileSource) else None
        return rng.permutation(content.size) if groups is None else _by_groups(rng, groups)

    def __getstate__(self) -> dict[str, object]:
        return {"sources": self.sources, "seed": self.seed, "counts": self.counts}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=4)(self._block)
        self._epochs = lru_cache(maxsize=8)(self._permutation)


GROUPS_TOGETHER = 4
"""Groups of a source that are shuffled together, and stay in memory meanwhile."""


def _by_groups(rng: np.random.Generator, sizes: Sequence[int]) -> NDArray[np.int64]:
    """A permutation of samples that takes some groups at a time, in a random order of groups."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = rng.permutation(len(sizes))
    windows = [order[n : n + GROUPS_TOGETHER] for n in range(0, len(order), GROUPS_TOGETHER)]
    samples = [
        rng.permutation(np.concatenate([np.arange(starts[g], starts[g + 1]) for g in window]))
        for window in windows
    ]
    return np.concatenate(samples)


def _shares(weights: Sequence[float]) -> list[int]:
    """Draws of a block per source: at least 1, the rest by largest remainder."""
    exact = np.array(weights) / sum(weights) * (BLOCK - len(weights)) + 1
    counts = np.floor(exact).astype(int)
    for source in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
        counts[source] += 1
    return [int(count) for count in counts]


MAX_LINE_BYTES = 16 * 2**20
"""Size of one record."""
MAX_RECORDS = 200_000_000
"""Records of one file, of which the spans are kept in memory: 24 bytes each."""
Spans = NDArray[np.int64]
"""First byte, bytes and number from 1 of every record of a file, [n, 3]."""


class RecordSource(FileSource):
    """Samples of a file, or of all files below a folder in order of their names.

    Paths of images are relative to `root`, by default each file's folder, and must stay below it,
    links followed. A subclass indexes `path`. Raises DataError when there is nothing to read, or
    the files are of another form.
    """

    def __init__(
        self,
        path: Path,
        *,
        root: Path | None = None,
        rules: RecordRules | None = None,
        colour_profiles: bool = True,
    ) -> None:
        self.root, self.rules, self.colour_profiles = root, rules or RecordRules(), colour_profiles
        self.name, self.damage, self.files = path.name or str(path), [], []
        self._index(path)
        if not self.size:
            why = f" ({self.damage[0]})" if self.damage else ""
            raise DataError(f"the data {path} holds no samples{why}")

    @classmethod
    def of(cls, data: RecordData) -> Self:
        """The source of a recipe's item. Raises DataError."""
        return cls(
            Path(data.path),
            root=data.image_folder,
            rules=data.rules,
            colour_profiles=data.colour_profiles,
        )

    @abstractmethod
    def _index(self, path: Path) -> None:
        """Find files and samples."""

    def _from_record(self, record: Any, blobs: Blobs, file: Path, number: int) -> Unread:
        """The sample of a record of a file; `number` is its place there, from 1."""
        root = self.root or file.parent
        sample = sample_from_record(record, root, self.rules, blobs)
        name = sample.id or f"{file.stem}-{number}"
        return Unread(replace(sample, id=name), partial(blob_or_file, root, blobs))


class RecordFiles(RecordSource):
    """Records one after the other; only the span of each is kept in memory.

    A subclass finds the spans and parses one.
    """

    place: ClassVar[str]
    """Noun of a record's place in its file, for messages."""

    def _index(self, path: Path) -> None:
        self.files = self.files_of(path)
        spans = [self.spans_of(file) for file in self.files]
        self._spans = np.concatenate(spans) if spans else np.zeros((0, 3), np.int64)
        numbers = [np.full(len(of_file), n) for n, of_file in enumerate(spans)]
        self._file_of = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)

    @abstractmethod
    def files_of(self, path: Path) -> list[Path]:
        """The files to read. Raises DataError for what is not there or of another form."""

    @abstractmethod
    def spans_of(self, file: Path) -> Spans:
        """The spans of a file's records; what cannot be read of it goes into `damage`."""

    def parse(self, file: Path, content: bytes) -> Any:
        """A record from the bytes of its span. Raises DataError."""
        return parse_record(content)

    @property
    def size(self) -> int:
        return len(self._spans)

    def location(self, index: int) -> str:
        """File and place of a sample."""
        return f"{self.files[self._file_of[index]].name}, {self.place} {self._spans[index][2]}"

    def record(self, index: int) -> Any:
        """One record as it stands in its file. Raises DataError and OSError."""
        file = self.files[self._file_of[index]]
        start, length, _ = (int(value) for value in self._spans[index])
        if length > MAX_LINE_BYTES:
            raise DataError(f"longer than {MAX_LINE_BYTES} bytes")
        # Opened each time: worker processes must not share a file offset.
        with file.open("rb") as stream:
            stream.seek(start)
            return self.parse(file, stream.read(length))

    def _unread(self, index: int) -> Unread:
        file = self.files[self._file_of[index]]
        return self._from_record(self.record(index), {}, file, int(self._spans[index][2]))


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class JsonlData(RecordData):
    """`kind = "jsonl"`: a file of JSON lines, or all below a folder."""

    kind: Literal["jsonl"] = "jsonl"

    def build(self) -> JsonlSource:
        return JsonlSource.of(self)


class JsonlSource(RecordFiles):
    """One .jsonl file, or all below a folder."""

    place = "line"

    def files_of(self, path: Path) -> list[Path]:
        return data_files(path, ".jsonl", "jsonl")

    def spans_of(self, file: Path) -> Spans:
        spans = array("q")
        start = 0
        with file.open("rb") as stream:
            number = 1
            # Bounded reads: a file without line ends must not fill the memory.
            length, blank = 0, True
            while piece := stream.readline(2**20):
                length += len(piece)
                blank = blank and not piece.strip()
                if number > MAX_RECORDS:
                    raise DataError(f"{file.name} has more than {MAX_RECORDS:,} lines")
                if piece.endswith(b"\n"):
                    if not blank:
                        spans.extend((start, length, number))
                    start, length, blank, number = start + length, 0, True, number + 1
            if length and not blank:
                spans.extend((start, length, number))
        return np.frombuffer(spans, np.int64).reshape(-1, 3)


def data_files(path: Path, ending: str, kind: str) -> list[Path]:
    """A file, or all of an ending below a folder. Raises DataError for those of another kind."""
    try:
        if not path.exists():
            raise DataError(f"the data {path} is not there")
        if not path.is_dir() and not path.is_file():
            raise DataError(f"the data {path} is neither a file nor a folder")
        files = files_below(path, ending) if path.is_dir() else [path]
        for file in files or [path]:
            if what := recognise(file).but_for(kind):
                raise DataError(f"the data {file} {what}")
        if not files:
            raise DataError(f"the data {path} holds no {ending} file")
    except OSError as error:
        raise DataError(f"the data {path} cannot be read: {error}") from error
    return files
