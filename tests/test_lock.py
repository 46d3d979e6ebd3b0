"""One process at a time writes to a folder; a killed one leaves it free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from neounify import lock
from neounify.lock import LOCK_FILE, FolderInUse, is_empty, locked_folder

HOLD = """
import sys
from pathlib import Path
from typing import IO
from neounify.lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `run` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_number_of_the_first(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with (
        pytest.raises(FolderInUse, match=rf"run is in use by another process \(pid {holder.pid}\)"),
        locked_folder(tmp_path / "run"),
    ):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with locked_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_an_empty_folder_that_was_created_goes_again(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    with locked_folder(folder):
        assert is_empty(folder)
    assert not (tmp_path / "out").exists()
    with locked_folder(folder):
        (folder / "log").touch()
        assert not is_empty(folder)
    assert [path.name for path in folder.iterdir()] == ["log"]


def test_an_error_inside_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked_folder(tmp_path):
        raise KeyError
    with locked_folder(tmp_path), pytest.raises(FolderInUse), locked_folder(tmp_path):
        pass


def test_a_lock_file_removed_in_between_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first holder removes the file after the second opened it, before the second locks."""
    real = lock._flock
    removed: list[IO[str]] = []

    def flock(file: IO[str]) -> None:
        if not removed:
            removed.append(file)
            (tmp_path / LOCK_FILE).unlink()
            (tmp_path / LOCK_FILE).touch()
        real(file)

    monkeypatch.setattr(lock, "_flock", flock)
    with locked_folder(tmp_path):
        assert removed
        with pytest.raises(FolderInUse), locked_folder(tmp_path):
            pass
