"""Bounded reads, atomic writes, checks of output names, and folders with one writer."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from neounify import files
from neounify.errors import CheckpointError
from neounify.files import (
    LOCK_FILE,
    FolderInUse,
    atomic_file,
    atomic_folder,
    check_absent,
    check_empty,
    is_empty,
    locked_folder,
    read_bytes,
    read_json,
    read_text,
    remove_leftovers,
    write_bytes,
    write_json,
    write_new,
)

HOLD = """
import sys
from pathlib import Path
from typing import IO
from neounify.files import locked_folder
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


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(NotADirectoryError, match="is a file; a folder is needed"),
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
    real = files._flock
    removed: list[IO[str]] = []

    def flock(file: IO[str]) -> None:
        if not removed:
            removed.append(file)
            (tmp_path / LOCK_FILE).unlink()
            (tmp_path / LOCK_FILE).touch()
        real(file)

    monkeypatch.setattr(files, "_flock", flock)
    with locked_folder(tmp_path):
        assert removed
        with pytest.raises(FolderInUse), locked_folder(tmp_path):
            pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_written(path: Path) -> None:
    path.write_bytes(b"half")
    raise KeyError


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5, CheckpointError) == b"12345"
    with pytest.raises(CheckpointError, match=r"a: larger than 4 bytes"):
        read_bytes(path, 4, CheckpointError)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gone", "No such file"), (".", "Is a directory"), ("a\0b", "null byte")],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be read: .*{reason}"):
        read_bytes(tmp_path / name, 5, CheckpointError)


def test_text_is_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text("grün", encoding=encoding)
        assert read_text(path, 99, CheckpointError) == "grün"
    path.write_text("grün", encoding="latin-1")
    with pytest.raises(CheckpointError, match="a: not UTF-8 text"):
        read_text(path, 99, CheckpointError)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[" * 10_000, "not valid JSON"), ("[]", "object, found list")],
)
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"a\.json: .*{message}"):
        read_json(path, 99_999, CheckpointError)


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"grün": [1, None]})
    assert read_json(tmp_path / "a.json", 99, CheckpointError) == {"grün": [1, None]}


@pytest.mark.parametrize("name", ["a", "x" * 255, "湖" * 85])
def test_a_file_is_replaced_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert write_new(path, b"one")
    assert not write_new(path, b"two")
    with pytest.raises(KeyError), atomic_file(path) as aside:
        half_written(aside)
    assert path.read_bytes() == b"one"
    write_bytes(path, b"three")
    assert path.read_bytes() == b"three"
    assert names(tmp_path) == [name]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        write_bytes(tmp_path / "gone" / "a", b"")
    assert caught.value.filename == str(tmp_path / "gone" / "a")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with atomic_folder(folder) as aside:
        (aside / "a").touch()
        assert not folder.exists()
    with pytest.raises(KeyError), atomic_folder(folder) as aside:
        half_written(aside / "b")
    assert names(folder) == ["a"]
    with atomic_folder(folder) as aside:
        (aside / "c").touch()
    assert names(folder) == ["c"]
    assert names(tmp_path / "new") == ["folder"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".step-1.ab.saving", ".step-3.cd.replaced", ".other.ab.saving", "step-3"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-4.json.ef.saving").touch()
    remove_leftovers(tmp_path, "step-*")
    assert names(tmp_path) == [".other.ab.saving", "step-3"]
    remove_leftovers(tmp_path / "gone", "*")


def test_a_folder_that_was_moved_away_and_not_replaced_comes_back(tmp_path: Path) -> None:
    """A process was killed between the two renames of a system that cannot exchange folders."""
    for name in (".step-2.cd.replaced", ".step-2.cd.saving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name[-6:]).touch()
    long = f".step-{'x' * 35}.cd.replaced"
    (tmp_path / long).mkdir()
    remove_leftovers(tmp_path, "step-*")
    assert names(tmp_path) == [long, "step-2"]
    assert names(tmp_path / "step-2") == ["placed"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Where folders can be exchanged; elsewhere the content of before has another name."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    folder = tmp_path / "folder"
    seen: list[list[list[str]]] = []
    rename = Path.rename

    def look(path: Path, target: Path) -> Path:
        seen.append([names(path) for path in tmp_path.iterdir()])
        return rename(path, target)

    for name in ("a", "b"):
        with atomic_folder(folder) as aside:
            (aside / name).touch()
        assert names(folder) == [name]
        monkeypatch.setattr(Path, "rename", look)
    assert names(tmp_path) == ["folder"]
    assert [sorted(contents) for contents in seen] == ([] if exchange else [[["a"], ["b"]]] * 2)


def test_what_is_written_reaches_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its name before the call returns."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_sync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        events.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_bytes(tmp_path / "a", b"one")
    assert events == ["file", "replace", "folder"]
    events.clear()
    assert write_new(tmp_path / "b", b"one")
    assert events == ["file", "folder"]
    events.clear()
    with atomic_folder(tmp_path / "c") as aside:
        (aside / "d").touch()
    assert events == ["file", "folder", "folder"]


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    check_empty(folder, "a model", CheckpointError)
    with locked_folder(folder):
        check_empty(folder, "a model", CheckpointError)
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="out is not empty; add --overwrite"):
        check_empty(folder, "a model", CheckpointError, hint="add --overwrite")
    check_empty(folder, "a model", CheckpointError, overwrite=True)
    with pytest.raises(CheckpointError, match=r"txt is a file; a model is saved as a folder"):
        check_empty(folder / "thesis.txt", "a model", CheckpointError, overwrite=True)


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    check_absent(tmp_path / "a", CheckpointError, "choose another name")
    (tmp_path / "a").touch()
    with pytest.raises(CheckpointError, match="a already exists; choose another name"):
        check_absent(tmp_path / "a", CheckpointError, "choose another name")
