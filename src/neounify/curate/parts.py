"""Parts: files of a curation whose names carry a digest of all that they were made from.

They are written aside and moved, so one that is there is whole, and a rerun skips its work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neounify.curate.recipe import CurateError
from neounify.errors import missing_extra
from neounify.files import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa

DIGEST_CHARACTERS = 16
CODE = ("curate", "image", "data")
"""Packages whose code decides what a part holds."""


def digest_of(*values: Any) -> str:
    """A digest of values: dataclasses, text, numbers, lists and tables of them."""
    text = json.dumps(values, sort_keys=True, default=_plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


@lru_cache(maxsize=1)
def code_version() -> str:
    """A digest of the code that makes parts."""
    root = Path(__file__).parents[1]
    files = sorted(file for package in CODE for file in (root / package).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def part_path(folder: Path, name: str, digest: str, ending: str) -> Path:
    """The path of a part."""
    return folder / f"{name}-{digest}{ending}"


def arrow() -> Any:
    """The module pyarrow, with `parquet`. Raises CurateError where it is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise CurateError(missing_extra("tables of a curation", "curate", error)) from error
    return pa


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file, all or nothing. Raises CurateError."""

    def write(aside: Path) -> None:
        arrow().parquet.write_table(table, aside, compression="zstd")

    write_part(path, write)


def write_part(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file aside and move it. Raises CurateError, for a full disk too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as aside:
            write(aside)
    except OSError as error:
        raise CurateError(f"{path} cannot be written: {error.strerror or error}") from error


def read_table(path: Path, columns: Iterable[str] | None = None) -> pa.Table:
    """A parquet file, or some of its columns. Raises CurateError."""
    pa = arrow()
    try:
        return pa.parquet.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise CurateError(f"{path} is damaged, remove it and run again: {error}") from error
