"""Files: bounded reads, atomic writes, and output folders with one writer at a time.

What an atomic write has written is on the disk, name and all, when it returns.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from neounify.errors import NeounifyError

if sys.platform != "win32":
    import fcntl

WEIGHT_FILES = (".safetensors", ".gguf")
"""Endings of the files of weights that are read."""
LOCK_FILE = ".neounify.lock"
ASIDE_SUFFIX = ".saving"
"""Ending of hidden files and folders that are being written; a killed process leaves them."""
REPLACED_SUFFIX = ".replaced"
"""Ending of hidden folders that are being replaced, where a system cannot exchange two folders."""
_MAX_ASIDE_CHARACTERS = 40
_HASHED_BYTES = 2**20
_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def read_bytes(path: Path, max_bytes: int, error: type[NeounifyError]) -> bytes:
    """The content of an untrusted file, read in one go. Raises `error`, also above `max_bytes`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the path
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{path}: cannot be read: {reason}") from failure
    if len(data) > max_bytes:
        raise error(f"{path}: larger than {max_bytes} bytes, the largest size allowed")
    return data


def read_text(path: Path, max_bytes: int, error: type[NeounifyError]) -> str:
    """The text of an untrusted UTF-8 file, without a byte order mark. Raises `error`."""
    try:
        return read_bytes(path, max_bytes, error).decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{path}: not UTF-8 text: {failure.reason}") from failure


def read_json(path: Path, max_bytes: int, error: type[NeounifyError]) -> dict[str, Any]:
    """The JSON object in an untrusted file. Raises `error`."""
    return parse_json_object(read_bytes(path, max_bytes, error), path, error)


def parse_json_object(data: bytes, path: Path, error: type[NeounifyError]) -> dict[str, Any]:
    """The JSON object in the content of the file `path`. Raises `error`."""
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as failure:
        raise error(f"{path}: not valid JSON: {failure}") from failure
    if not isinstance(document, dict):
        raise error(f"{path}: must hold a JSON object, found {type(document).__name__}")
    return document


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of any size. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASHED_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def is_unicode(document: Any) -> bool:
    """Whether UTF-8 has the texts of a JSON document; JSON can also name half a surrogate pair."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def write_bytes(path: Path, data: bytes) -> None:
    """Write or replace a file, all or nothing. Raises OSError."""
    with atomic_file(path) as aside:
        aside.write_bytes(data)


def write_json(path: Path, document: Any, *, indent: int = 2) -> None:
    """Write or replace a JSON file, all or nothing. Raises OSError."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())


def write_new(path: Path, data: bytes) -> bool:
    """Write a file, all or nothing, unless one exists; returns whether it did. Raises OSError."""
    aside = _aside(path)
    try:
        aside.write_bytes(data)
        _sync(aside)
        try:
            os.link(aside, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            aside.replace(path)
        _sync(path.parent)
        return True
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A new name beside `path`; the file written there replaces `path` at the end of the block.

    After an error, which names `path`, the file of before is unchanged. The folder must exist.
    """
    aside = _aside(path)
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        if str(error.filename) == str(aside):
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that replaces `path` at the end of the block.

    After an error the folder of before is unchanged. Missing parents are created.
    """
    aside = _aside(path)
    try:
        aside.mkdir(parents=True)
        yield aside
        _sync(*aside.rglob("*"), aside)
        _swap(aside, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; a kill meanwhile leaves no part of it under its name. Raises OSError."""
    aside = _aside(path)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove unfinished files and folders of killed processes, for names of `pattern`.

    A folder that was moved away and never replaced gets its name back.
    """
    if not folder.is_dir():
        return
    for path in folder.glob(f".{pattern}{REPLACED_SUFFIX}"):
        name = path.name[1:].rsplit(".", 2)[0]
        if len(name) == _MAX_ASIDE_CHARACTERS:
            continue  # maybe cut, so that the folder it belongs to is unknown
        if (folder / name).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(folder / name)
    for path in folder.glob(f".{pattern}{ASIDE_SUFFIX}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_absent(path: Path, error: type[NeounifyError], hint: str) -> None:
    """Raise `error`, which ends with `hint`, if there is a file or folder of this name."""
    if path.exists():
        raise error(f"{path} already exists; {hint}")


def check_empty(
    folder: Path,
    what: str,
    error: type[NeounifyError],
    *,
    overwrite: bool = False,
    hint: str = "choose another folder, or overwrite it explicitly",
) -> None:
    """Raise `error` unless `what`, such as "a model", can be saved as `folder` without loss.

    The folder may be missing or empty, the lock left aside; with `overwrite` it may also be full,
    but no file. `hint` ends the error about a full one.
    """
    if folder.exists() and not folder.is_dir():
        raise error(f"{folder} is a file; {what} is saved as a folder")
    if not overwrite and folder.exists() and not is_empty(folder):
        raise error(f"{folder} is not empty; {hint}")


class FolderInUse(NeounifyError):
    """Another process is writing to the folder."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of `folder`, which is created if need be.

    The system releases the lock when the process dies, however it dies. A folder created here that
    is still empty at the end is removed again. File systems that cannot lock are used without.
    Raises FolderInUse with the number of the process that holds the lock, and OSError when the
    folder cannot be created or written to.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "is a file; a folder is needed", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    try:
        file = _lock(path)
        try:
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()
    finally:
        with suppress(OSError):  # not empty
            for empty in created:
                empty.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, the lock left aside."""
    return all(path.name == LOCK_FILE for path in folder.iterdir())


def _lock(path: Path) -> IO[str]:
    """The lock file, open, locked and emptied."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _flock(file)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(32).strip() or "unknown"
            file.close()
            raise FolderInUse(
                f"{path.parent} is in use by another process (pid {owner}); wait until it ends, or "
                "choose another output folder"
            ) from None
        # The last holder may have removed the file between opening and locking.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                return file
        file.close()


def _flock(file: IO[str]) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have no locks
        return


def _aside(path: Path) -> Path:
    """A hidden name beside a path; long ones are cut, as systems limit names to 255 bytes."""
    return path.with_name(
        f".{path.name[:_MAX_ASIDE_CHARACTERS]}.{secrets.token_hex(8)}{ASIDE_SUFFIX}"
    )


def _swap(aside: Path, target: Path) -> None:
    """Replace the folder `target` by `aside`.

    In one step where the system can exchange two folders; elsewhere there is a moment without
    `target`; `remove_leftovers` restores it after a kill.
    """
    if target.exists() and _exchange(aside, target):
        shutil.rmtree(aside, ignore_errors=True)
        return
    old = aside.with_suffix(REPLACED_SUFFIX)
    if target.exists():
        target.rename(old)
    try:
        aside.rename(target)
    except BaseException:
        with suppress(OSError):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # a C library without it
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0)


def _sync(*paths: Path) -> None:
    """Flush files and folders to the disk."""
    for path in paths if sys.platform != "win32" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # some network file systems cannot flush folders
                raise
        finally:
            os.close(descriptor)
