"""Exclusive use of an output folder by one process at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from neounify.errors import NeounifyError

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".neounify.lock"


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
