"""Files that appear whole or not at all, under names that take nobody's place."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neounify.cli.errors import CliError, WriteError

MAX_SLUG_CHARACTERS = 48
MAX_SLUG_BYTES = 120


def slug(text: str) -> str:
    """A short file name from a prompt: its words, in small letters, joined by hyphens."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).casefold())
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:MAX_SLUG_CHARACTERS]
        if len(longer) > MAX_SLUG_CHARACTERS:
            break
        name = longer
    # Systems limit names in bytes, and a letter may take four.
    short = name.encode("utf-8", "ignore")[:MAX_SLUG_BYTES]
    return short.decode("utf-8", "ignore").strip("-") or "untitled"


def candidates(path: Path) -> Iterator[Path]:
    """The path, then the same with -2, -3, … before its suffix."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def make_folder(folder: Path) -> Path:
    """The folder, made if need be. Raises CliError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"{folder} cannot be made: {error.strerror or error}") from error
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file, all or nothing. Raises WriteError."""
    with _aside(path, data) as ready:
        ready.replace(path)


def write_new(path: Path, data: bytes) -> bool:
    """Write a file, all or nothing, unless one is there; whether it was written.

    Raises WriteError.
    """
    with _aside(path, data) as ready:
        try:
            os.link(ready, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            ready.replace(path)
    return True


def append_line(path: Path, line: bytes) -> None:
    """Append to a file. Raises WriteError; a line that was cut off has no end of line."""
    try:
        with path.open("ab") as file:
            file.write(line)
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> WriteError:
    """The error for a file that could not be written."""
    return WriteError(f"{path} could not be written: {error.strerror or error}")


@contextmanager
def _aside(path: Path, data: bytes) -> Iterator[Path]:
    aside = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        aside.write_bytes(data)
        yield aside
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        aside.unlink(missing_ok=True)
