"""Output files and folders: names, checks before long work, atomic writes."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from neounify import files
from neounify.cli.command import CliError, WriteError, explain_os_error

MAX_SLUG_CHARACTERS = 48
MAX_SLUG_BYTES = 120


def slug(text: str) -> str:
    """A short file name from a prompt: its words in lower case, joined by hyphens."""
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
    """The folder, created if need be. Raises CliError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"{folder} cannot be created: {error.strerror or error}") from error
    return folder


def writable_folder(folder: Path) -> Path:
    """The folder, created if need be. CliError if files cannot be created in it."""
    check_writable(folder)
    return make_folder(folder)


def check_writable(folder: Path) -> None:
    """CliError if files cannot be created in the folder, or in its nearest existing parent."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or explain_os_error(error)
        action = "written to" if nearest == folder else "created"
        raise CliError(f"{folder} cannot be {action}: {reason}") from error


def check_new_folder(folder: Path, what: str, *, overwrite: bool) -> None:
    """CliError for a path that is a file, or a folder that holds files unless `overwrite`.

    `what` is saved there: "a model".
    """
    hint = "choose another folder, or add --overwrite"
    files.check_empty(folder, what, CliError, overwrite=overwrite, hint=hint)


def check_apart(output: Path, *sources: Path | None) -> None:
    """CliError if `output` is a source or a folder that one lies in, so that saving would lose it.

    `sources` are what a command reads; links count by where they stand and by what they name.
    """
    target = output.resolve()
    for source in sources:
        if source is None:
            continue
        named = Path(os.path.normpath(source.absolute()))
        for path in (named, named.resolve()):
            if target in (place.resolve() for place in (path, *path.parents)):
                how = "is" if target == source.resolve() else "contains"
                raise CliError(f"{output} {how} {source}, which is read; write to another folder")


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file atomically. Raises WriteError."""
    try:
        files.write_bytes(path, data)
    except OSError as error:
        raise write_error(path, error) from error


def write_new(path: Path, data: bytes) -> bool:
    """Write a file atomically unless it exists; whether it was written.

    Raises WriteError.
    """
    try:
        return files.write_new(path, data)
    except OSError as error:
        raise write_error(path, error) from error


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
