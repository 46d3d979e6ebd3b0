"""Cases of a benchmark, and the files of its prompts, each hashed as it is read."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neounify.errors import NeounifyError
from neounify.files import file_sha256, is_unicode, read_bytes
from neounify.image import MAX_FILE_BYTES

if TYPE_CHECKING:
    from neounify.data.parquet import ParquetSource

MAX_PROMPT_BYTES = 2**30
"""Largest file of prompts: sets of questions hold their images as base64."""
MAX_NAME_BYTES = 200
TABLES = (".tsv", ".csv")
BASE64, PARQUET = "base64:", "parquet:"
"""Beginnings of input images that are no files: base64, and FILE#ROW#COLUMN of a table."""
READ_BY_US = frozenset({"index", "stem"})
"""Fields that every reader adds."""
Task = Literal["image", "edit", "story", "question"]
Record = dict[str, Any]


class BenchError(NeounifyError):
    """Prompts, a run or a result that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt of a benchmark, and where its outputs go.

    `files` are paths below the folder of images, one per file that the scorer reads: one for each
    of the `samples`, or a single one that holds them all. `images` are the inputs: files, or
    base64. `sides` are further files, such as the scorer's metadata, with their text, and `copies`
    are those that hold an image beside the prompts, with its place there.
    """

    id: str
    category: str
    prompt: str
    record: Mapping[str, Any]
    files: tuple[str, ...] = ()
    samples: int = 1
    images: tuple[str, ...] = ()
    sides: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> Record:
        """The case as plain data."""
        return dict(vars(self)) | {"files": list(self.files), "images": list(self.images)}

    @staticmethod
    def from_json(document: Record) -> Case:
        """The case that `to_json` wrote."""
        lists = {name: tuple(document[name]) for name in ("files", "images")}
        return Case(**(document | lists))


class PromptFiles:
    """The file or folder of a benchmark's prompts; what is read of it is hashed."""

    def __init__(self, root: Path) -> None:
        if not root.exists():
            raise BenchError(f"{root} does not exist; it must be the prompts of the benchmark")
        self.root = root
        self.hashes: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        """The folder of the prompts, which paths of input images start at."""
        return self.root if self.root.is_dir() else self.root.parent

    @property
    def sha256(self) -> str:
        """Hash of what was read: of the file, or of the list that `sha256sum` prints of several."""
        if len(self.hashes) == 1:
            return next(iter(self.hashes.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.hashes.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def named(self, *patterns: str) -> list[Path]:
        """The file, or those of the folder that fit the first pattern of which there are any.

        In order of their names. Raises BenchError if none fit.
        """
        if self.root.is_file():
            return [self.root]
        for pattern in patterns:
            if paths := sorted(self.root.glob(pattern)):
                return paths
        raise BenchError(f"{self.root} has no {' or '.join(patterns)}")

    def text(self, path: Path) -> str:
        """The text of a file, UTF-8. Raises BenchError."""
        data = read_bytes(path, MAX_PROMPT_BYTES, BenchError)
        self.hashes[self._name(path)] = hashlib.sha256(data).hexdigest()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BenchError(f"{path}: not UTF-8 text: {error.reason}") from error

    def rows(self, path: Path) -> Iterator[Record]:
        """The rows of a Parquet table; images in cells are places that `image_bytes` reads.

        Raises DataError.
        """
        self.hashes[self._name(path)] = file_sha256(path)
        table = _parquet(path)
        for row in range(table.size):
            record, blobs = table.record(row)
            place = f"{PARQUET}{path.relative_to(self.folder).as_posix()}#{row}#"
            yield {
                name: place + name if isinstance(value, str) and value in blobs else value
                for name, value in record.items()
            }

    def _name(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """A JSON document. Raises BenchError with the file and the line."""
    place = path if line is None else f"{path}:{line}"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{place}: not valid JSON: {error}") from error
    if "\\u" in text and not is_unicode(document):
        raise BenchError(f"{place}: has half a surrogate pair, which no UTF-8 file can hold")
    return document


def text_lines(text: str) -> Iterator[str]:
    """The lines of a text with their ends; other marks that Unicode ends a line with are text."""
    start = 0
    while end := text.find("\n", start) + 1:
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def jsonl(text: str, path: Path) -> Iterator[Record]:
    """The JSON objects of a file, one per line that is not blank. Raises BenchError."""
    for number, line in enumerate(text_lines(text), 1):
        if line.strip():
            yield _object(parse_json(line, path, number), f"{path}:{number}")


def json_records(text: str, path: Path) -> Iterator[Record]:
    """The objects of a JSON list; of an object its values with their `key`, texts as `prompt`."""
    document = parse_json(text, path)
    if isinstance(document, list):
        for number, item in enumerate(document):
            yield _object(item, f"{path}: item {number}")
        return
    for key, item in _object(document, str(path)).items():
        value = {"prompt": item} if isinstance(item, str) else _object(item, f"{path}: {key}")
        yield {"key": key, **value}


def table(text: str, path: Path) -> Iterator[Record]:
    """The rows of a CSV or TSV file with a heading; empty cells are left out."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(text_lines(text), delimiter=delimiter)
    try:
        with _long_cells():
            read = [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        raise BenchError(f"{path}:{rows.line_num}: {error}") from error
    for line, row in read:
        if None in row:
            raise BenchError(f"{path}:{line}: {len(row[None])} cells more than the heading")
        yield {name: cell for name, cell in row.items() if cell not in (None, "")}


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells as long as a file, such as images in base64; the limit belongs to the process."""
    before = csv.field_size_limit(MAX_PROMPT_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def safe_name(value: Any, what: str) -> Any:
    """A value of a record as part of a file's name; BenchError for one that leaves its folder."""
    text = str(value)
    if text in ("", ".", "..") or len(text.encode()) > MAX_NAME_BYTES or set(text) & set("/\\\0"):
        raise BenchError(f"{what}: {text[:60]!r} cannot be part of a file's name")
    return value if isinstance(value, int) and not isinstance(value, bool) else text


def image_bytes(source: str, folder: Path) -> bytes:
    """An input image: of a file or a table below `folder`, or of base64. Raises BenchError."""
    if source.startswith(BASE64):
        try:
            return base64.b64decode(source.removeprefix(BASE64), validate=True)
        except ValueError as error:
            raise BenchError(f"an image in base64 cannot be decoded: {error}") from error
    name, *place = source.removeprefix(PARQUET).rsplit("#", 2) if _in_table(source) else [source]
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BenchError(f"{source}: an input image must lie below {folder}")
    if not place:
        return read_bytes(path, MAX_FILE_BYTES, BenchError)
    try:
        record, blobs = _parquet(path).record(int(place[0]))
        return blobs[record[place[1]]]
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{source}: the table has no such image ({error!r})") from error


def _in_table(source: str) -> bool:
    return source.startswith(PARQUET) and source.count("#") >= 2


@lru_cache(1)
def _parquet(path: Path) -> ParquetSource:
    """A table, kept while its rows are read one after the other."""
    from neounify.data.parquet import ParquetSource

    return ParquetSource(path)


def _object(item: Any, place: str) -> Record:
    if not isinstance(item, dict):
        raise BenchError(f"{place}: must be a JSON object, found {type(item).__name__}")
    return item
