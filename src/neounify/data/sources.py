"""Sample sources: protocol and table of formats, mixtures by weight, JSON lines and their images.

A new format is a file with a source and its `DataConfig`, and a line in `FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic.dataclasses import dataclass

from neounify.config.ranges import STRICT, Positive, check_names, read_kind
from neounify.data.formats import files_below, foreign_folder, foreign_lines
from neounify.data.sample import (
    TASK_ALIASES,
    TASKS,
    DataError,
    Part,
    Sample,
    SampleImage,
    Turn,
    parse_record,
    sample_from_record,
)
from neounify.errors import ImageError
from neounify.image import read_image
from neounify.image.io import MAX_DECODED_PIXELS

FORMATS = {
    "scenes": "neounify.scenes.world.samples:SceneData",
    "jsonl": "neounify.data.sources:JsonlData",
    "shards": "neounify.data.shards:ShardData",
}
"""The `DataConfig` of every kind of data, as "module:class"; imported when a recipe names it."""
DEFAULT_FORMAT = "scenes"


@runtime_checkable
class SampleSource(Protocol):
    """Samples by number, so that a position is one integer and resuming is exact.

    `size` is the number of samples; None for a source without end. An index always gives the
    same sample, in any process. A damaged sample raises DataError, which the loader counts.
    """

    @property
    def size(self) -> int | None: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class FileSource(SampleSource, Protocol):
    """Samples of files. `damage` lists files that could not be indexed, one message each."""

    name: str
    damage: list[str]

    def location(self, index: int) -> str:
        """Location of a sample, such as "train.jsonl, line 7"."""
        ...


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig(ABC):
    """The settings of one source of a stage, as an item of a recipe's `data` holds them.

    Its `kind` is its name in `FORMATS`. A mixture draws from it in proportion to `weight`.
    """

    kind: str
    weight: Positive = 1.0

    @abstractmethod
    def build(self) -> SampleSource:
        """The source. Raises DataError for data that cannot be read."""

    def tasks_drawn(self) -> Collection[str]:
        """Tasks that its samples may have."""
        return TASKS

    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of all its images; none where they are of any size."""
        return []


def read_data(value: Any) -> DataConfig:
    """An item of a recipe's `data` by its `kind`; a config is taken as it is. Raises ValueError."""
    if isinstance(value, DataConfig):
        return value
    config: DataConfig = read_kind(value, FORMATS, DEFAULT_FORMAT, "data")
    return config


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
        size = self.sources[source].size
        assert size is not None
        return np.random.default_rng((self.seed, 1, source, epoch)).permutation(size)

    def __getstate__(self) -> dict[str, object]:
        return {"sources": self.sources, "seed": self.seed, "counts": self.counts}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=4)(self._block)
        self._epochs = lru_cache(maxsize=8)(self._permutation)


def _shares(weights: Sequence[float]) -> list[int]:
    """Draws of a block per source: at least 1, the rest by largest remainder."""
    exact = np.array(weights) / sum(weights) * (BLOCK - len(weights)) + 1
    counts = np.floor(exact).astype(int)
    for source in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
        counts[source] += 1
    return [int(count) for count in counts]


MAX_SAMPLE_PIXELS = 2 * MAX_DECODED_PIXELS
"""Pixels of all images of one sample, which are in memory together: a gigabyte as RGB."""


def read_sample_images(sample: Sample, root: Path, *, colour_profiles: bool = True) -> Sample:
    """The sample with its files read as RGB. Raises DataError that names the file."""

    def read(path: Path) -> Image.Image:
        return read_sample_image(_inside(path, root), path.name, colour_profiles=colour_profiles)

    return map_images(sample, read)


def map_images(sample: Sample, read: Callable[[Path], Image.Image]) -> Sample:
    """The sample with images that are paths replaced by `read(path)`."""

    pixels = 0

    def mapped(part: Part) -> Part:
        nonlocal pixels
        if not isinstance(part, SampleImage) or not isinstance(part.image, Path):
            return part
        image = read(part.image)
        pixels += image.width * image.height
        if pixels > MAX_SAMPLE_PIXELS:
            raise DataError(
                f"the images of the sample have more than {MAX_SAMPLE_PIXELS:,} pixels together; "
                "make them smaller, or split the record"
            )
        return SampleImage(image, part.role)

    turns = (Turn(turn.role, tuple(mapped(part) for part in turn.parts)) for turn in sample.turns)
    return replace(sample, turns=tuple(turns))


def read_sample_image(
    source: Path | bytes, name: str, *, colour_profiles: bool = True
) -> Image.Image:
    """Read a file or its bytes; DataError that names it once."""
    try:
        return read_image(source, colour_profiles=colour_profiles)
    except ImageError as error:
        # The reader names a file by its path, and bytes by no name.
        text = str(error)
        known = isinstance(source, Path) and str(source) in text
        raise DataError(text if known else f"{name}: {text.removeprefix('the image: ')}") from error


def _inside(path: Path, root: Path) -> Path:
    """The path, once links are followed, if it lies below the root."""
    try:
        base, resolved = root.resolve(), path.resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # links in a circle; names no file can have
        raise DataError(f"the image {path.name[:80]!r} cannot be found: {error}"[:300]) from error
    if not resolved.is_relative_to(base):
        raise DataError(
            f"the image {path.name} lies outside the data folder {root}; name the folder of the "
            "images in the recipe (images = FOLDER beside path)"
        )
    if "\\" in path.name and not resolved.exists():
        raise DataError(f"there is no image {path.name}; paths are written with /")
    return resolved


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FileData(DataConfig):
    """Files of samples.

    `task` overrides what the records say, `ignore` names fields of records that are not to be
    read, and `colour_profiles = false` takes all pixels for sRGB, as the published code does.
    """

    path: str = ""
    task: str | None = None
    ignore: tuple[str, ...] = ()
    colour_profiles: bool = True

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f'data of kind "{self.kind}" needs a path')
        if self.task is not None:
            check_names("task", [self.task], (*TASKS, *TASK_ALIASES), "task")

    def tasks_drawn(self) -> Collection[str]:
        return TASKS if self.task is None else (self.task,)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JsonlData(FileData):
    """`kind = "jsonl"`: a file or folder of the published schema.

    `images` is the folder that paths of images are relative to and must stay below, by default
    that of each file.
    """

    kind: Literal["jsonl"] = "jsonl"
    images: str | None = None

    def build(self) -> JsonlSource:
        return JsonlSource(
            Path(self.path),
            root=None if self.images is None else Path(self.images),
            task=self.task,
            ignored=self.ignore,
            colour_profiles=self.colour_profiles,
        )


MAX_LINE_BYTES = 16 * 2**20


class JsonlSource:
    """One .jsonl file, or all below a folder in order of their names.

    Only the offsets of the lines are kept in memory. Paths of images are relative to `root`, by
    default each file's folder, and must stay below it, links followed. `task` overrides that of
    records; fields of records in `ignored` are not read; `colour_profiles` is that of
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
        lines = [_lines(file) for file in self.files]
        self._lines = np.concatenate(lines) if lines else np.zeros((0, 3), np.int64)
        numbers = [np.full(len(of_file), n) for n, of_file in enumerate(lines)]
        self._file_of = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
        if not len(self._lines):
            raise DataError(f"the data {path} holds no samples")

    @property
    def size(self) -> int:
        return len(self._lines)

    def location(self, index: int) -> str:
        """File and line of a sample."""
        return f"{self.files[self._file_of[index]].name}, line {self._lines[index][2]}"

    def __getitem__(self, index: int) -> Sample:
        """Read one line and its images. Raises DataError that names the line."""
        file = self.files[self._file_of[index]]
        start, length, number = (int(value) for value in self._lines[index])
        where = self.location(index)
        if length > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
        try:
            # Opened each time: worker processes must not share a file offset.
            with file.open("rb") as stream:
                stream.seek(start)
                record = parse_record(stream.read(length))
            root = self.root or file.parent
            sample = sample_from_record(record, root, self.task, self.ignored)
            sample = read_sample_images(sample, root, colour_profiles=self.colour_profiles)
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


def _lines(file: Path) -> np.ndarray:
    """(first byte, bytes, line number from 1) of every line that is not blank, [n, 3]."""
    lines = []
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
                    lines.append((start, length, number))
                start, length, blank, number = start + length, 0, True, number + 1
        if length and not blank:
            lines.append((start, length, number))
    return np.array(lines, np.int64).reshape(-1, 3)
