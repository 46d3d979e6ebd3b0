"""Input of a curation: containers (files or folders of a source), cut into units of samples.

A unit is the task of a worker. Its digest covers the content of its container, its stamp the sizes
and times of the images that lie beside it, so that a part made from both is known by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from neounify.curate.parts import digest_of
from neounify.curate.recipe import CurateError, CurateRecipe, Source
from neounify.data import DataError, Sample
from neounify.data.configs import FileData
from neounify.data.formats import files_below
from neounify.data.sources import FileSource
from neounify.files import file_sha256, read_bytes

ENDINGS = {"jsonl": ".jsonl", "shards": ".tar", "parquet": ".parquet"}
"""Kinds of data whose folders are read file by file."""
NOT_A_CONTAINER = "the data of source {source} cannot be read: {error}"


@dataclass(frozen=True)
class Container:
    """One file or folder of the source number `priority`."""

    source: str
    priority: int
    number: int
    data: FileData


@dataclass(frozen=True)
class Inventory:
    """Samples of a container, a digest of its content, and what could not be indexed."""

    size: int
    digest: str
    damage: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """Samples `start` to `stop` of a container; `name` is unique in a curation.

    `content` is the digest of the container, `digest` that of the unit in it.
    """

    name: str
    container: Container
    start: int
    stop: int
    content: str
    digest: str
    stamp: str = ""

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Item:
    """A sample and the files of its images, or the error why there is none.

    `contents` are the bytes of the images in order; an error in place of one that cannot be read.
    """

    location: str
    sample: Sample | None
    contents: tuple[bytes | str, ...] = ()
    error: str = ""

    def files(self) -> list[bytes]:
        """The contents. Raises CurateError for an image that could be read when it was measured."""
        for content in self.contents:
            if isinstance(content, str):
                raise CurateError(f"{self.location} has changed while it was read: {content}")
        return [content for content in self.contents if isinstance(content, bytes)]


def containers_of(sources: Sequence[Source]) -> list[Container]:
    """All containers, in the order of the recipe and of their names. Raises CurateError."""
    return [
        Container(source.name, priority, number, data)
        for priority, source in enumerate(sources)
        for number, data in enumerate(_split(source))
    ]


def _split(source: Source) -> list[FileData]:
    data, path = source.data, Path(source.data.path)
    ending = ENDINGS.get(data.kind)
    try:
        if ending is not None and path.is_dir():
            files = sorted(files_below(path, ending))
        elif ending is not None and "*" in path.name:
            files = sorted(path.parent.glob(path.name))
        else:
            files = [path]
    except OSError as error:
        raise CurateError(NOT_A_CONTAINER.format(source=source.name, error=error)) from error
    if not files:
        raise CurateError(f"source {source.name}: there are no {ending} files in {data.path}")
    return [replace(data, path=str(file)) for file in files]


def take_inventory(container: Container) -> Inventory:
    """Count and hash a container. Raises CurateError for one that holds no sample."""
    try:
        source = _build(container.data)
        path = Path(container.data.path)
        contents = [file_sha256(file) for file in source.files]
        content = digest_of(contents) if contents else folder_digest(path)
    except (DataError, OSError) as error:
        raise CurateError(NOT_A_CONTAINER.format(source=container.source, error=error)) from error
    settings = {k: str(v) for k, v in vars(container.data).items() if k not in ("path", "weight")}
    damage = tuple(writable(text) for text in source.damage)
    return Inventory(source.size, digest_of(content, settings, source.rules.described), damage)


def units_of(container: Container, inventory: Inventory, recipe: CurateRecipe) -> list[Unit]:
    """A container cut into units of `samples_per_unit` samples."""
    size = recipe.samples_per_unit
    return [
        Unit(
            name=f"{container.source}-{container.number:05d}-{start // size:05d}",
            container=container,
            start=start,
            stop=min(start + size, inventory.size),
            content=inventory.digest,
            digest=digest_of(inventory.digest, container.source, container.number, start, size),
        )
        for start in range(0, inventory.size, size)
    ]


def stamp_unit(unit: Unit) -> str:
    """A digest of the sizes and times of the files that the samples of a unit name.

    Images inside a shard are part of its content. Raises CurateError.
    """
    if unit.container.data.kind == "shards":
        return ""
    source, stamps = _source_of(unit), list[tuple[int, int] | None]()
    for index in range(unit.start, unit.stop):
        try:
            unread = source.unread(index)
        except DataError:
            continue
        for image in unread.sample.images:
            assert isinstance(image.image, Path)
            try:
                content, _ = unread.find(image.image)
                stat = content.stat() if isinstance(content, Path) else None
                stamps.append(stat and (stat.st_size, stat.st_mtime_ns))
            except (DataError, OSError):
                stamps.append(None)
    return digest_of(stamps)


def read_items(unit: Unit, max_bytes: int) -> Iterator[Item]:
    """The samples of a unit in order, one in memory at a time. Raises CurateError."""
    source = _source_of(unit)
    for index in range(unit.start, unit.stop):
        yield _item(source, index, max_bytes)


def _source_of(unit: Unit) -> FileSource:
    try:
        source = _source(unit.container.data, unit.content)
    except (DataError, OSError) as error:
        raise CurateError(f"{unit.name} cannot be read any more: {error}") from error
    if source.size < unit.stop:
        raise CurateError(f"{source.name} has changed while it was read; run again")
    return source


def writable(text: str) -> str:
    """The text without what UTF-8 cannot write: half characters of JSON, bytes of file names."""
    return text.encode("utf-8", "replace").decode()


def _item(source: FileSource, index: int, max_bytes: int) -> Item:
    location = writable(source.location(index))
    try:
        unread = source.unread(index)
    except DataError as error:
        return Item(location, None, error=writable(str(error)))
    sample = replace(unread.sample, id=writable(unread.sample.id))
    if sample.clips:
        return Item(location, None, error="it has a clip, and only images and texts are curated")
    contents: list[bytes | str] = []
    for image in sample.images:
        assert isinstance(image.image, Path)
        try:
            content, _ = unread.find(image.image)
            if isinstance(content, Path):
                content = read_bytes(content, max_bytes, DataError)
            contents.append(content)
        except (DataError, OSError) as error:
            contents.append(writable(str(error)))
    return Item(location, sample, tuple(contents))


@lru_cache(maxsize=2)
def _source(data: FileData, content: str) -> FileSource:
    """The source of a container with this digest; the next units are mostly of the same one."""
    return _build(data)


def _build(data: FileData) -> FileSource:
    source = data.build()
    if not isinstance(source, FileSource):
        raise DataError(f'data of kind "{data.kind}" is generated, not read')
    return source


def folder_digest(folder: Path) -> str:
    """Names, sizes and times of all files below a folder."""
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            entries.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return digest_of(entries)
