"""One mapped safetensors file: right values without copies, and no way in for a bad file."""

import gc
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.checkpoint import MappedFile
from neounify.checkpoint.mapped import DTYPES
from neounify.errors import CheckpointError


def raw_file(path: Path, header: dict[str, Any] | bytes, data: bytes, pad: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    values = torch.arange(-6, 6).reshape(3, 4)
    return {str(dtype): values.to(dtype) for dtype in DTYPES.values()}


def test_every_dtype_reads_as_written(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 3)
    path = tmp_path / "all.safetensors"
    save_file(tensors, path)
    file = MappedFile(path)
    headers = {name: (info.shape, info.dtype) for name, info in file.tensors.items()}
    assert headers == {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for name, expected in load_file(path).items():
        stored = file.tensor(name)
        assert stored.dtype == expected.dtype
        assert torch.equal(stored.double(), expected.double())


def test_tensors_are_views_and_writing_to_one_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.arange(8.0)}, path)
    before = path.read_bytes()
    file = MappedFile(path)
    file.tensor("a").mul_(2)
    assert file.is_view("a")
    assert file.tensor("a").tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert path.read_bytes() == before


def test_a_view_outlives_the_file_object_and_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.arange(8.0)}, path)
    view = MappedFile(path).tensor("a")
    path.unlink()
    assert view.sum() == 28


@pytest.mark.skipif(sys.platform != "linux", reason="looks for open files in /proc")
def test_nothing_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.arange(8.0)}, path)
    file = MappedFile(path)
    assert file.head("a", 8) == torch.arange(2.0).numpy().tobytes()
    view = file.tensor("a")
    del file
    gc.collect()
    assert view.sum() == 28
    del view
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert path not in [link.resolve() for link in Path("/proc/self/fd").iterdir()]


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0, 3.25])
    data = b"\x01\x02\x03" + values.numpy().tobytes()
    header = {"flags": entry("U8", [3], 0, 3), "values": entry("F32", [3], 3, 15)}
    file = MappedFile(raw_file(tmp_path / "odd.safetensors", header, data))
    aligned = (8 + len(json.dumps(header)) + 3) % 4 == 0
    assert not aligned
    assert not file.is_view("values")
    assert torch.equal(file.tensor("values"), values)
    assert file.tensor("flags").tolist() == [1, 2, 3]


def test_released_pages_leave_memory_and_come_back(
    tmp_path: Path, memory_status: Callable[[str], int]
) -> None:
    size = 8 * 2**20
    path = tmp_path / "big.safetensors"
    save_file({"a": torch.full((size,), 1.0), "b": torch.full((size,), 2.0)}, path)
    file = MappedFile(path)
    a, b = file.tensor("a"), file.tensor("b")
    start = memory_status("RssFile")
    assert [float(t.sum()) for t in (a, b)] == [size, 2 * size]
    touched = memory_status("RssFile") - start
    assert touched > 7 * size
    file.release("a")
    after = memory_status("RssFile") - start
    assert 3.5 * size < after < 4.5 * size
    assert [float(t.sum()) for t in (a, b)] == [size, 2 * size]
    file.release("b", 0, 2 * size)
    assert 5.5 * size < memory_status("RssFile") - start < 6.5 * size


def test_release_spares_the_neighbours_pages(tmp_path: Path) -> None:
    path = tmp_path / "three.safetensors"
    save_file({name: torch.zeros(1500) for name in "abc"}, path)
    file = MappedFile(path)
    for name in "ac":
        file.tensor(name).fill_(7)
    file.release("b")
    assert all((file.tensor(name) == 7).all() for name in "ac")


@pytest.mark.skipif(sys.platform != "linux", reason="relies on sparse files and /proc")
def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = memory + memory // 2
    path = raw_file(tmp_path / "huge.safetensors", {"a": entry("U8", [size], 0, size)}, b"")
    os.truncate(path, path.stat().st_size + size)
    huge = MappedFile(path).tensor("a")
    huge[-1] = 7
    assert [huge.numel(), int(huge[0]), int(huge[-1])] == [size, 0, 7]


def _truncated(path: Path) -> None:
    save_file({"a": torch.arange(100.0)}, path)
    os.truncate(path, path.stat().st_size - 1)


def _too_long(path: Path) -> None:
    save_file({"a": torch.arange(100.0)}, path)
    with path.open("ab") as file:
        file.write(b"\0")


def _zip_pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, path)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncated, "not a whole safetensors file"),
    "trailing bytes": (_too_long, "not a whole safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "only 0 bytes"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567"), "only 7 bytes"),
    "garbage": (lambda p: p.write_bytes(bytes(range(1, 256)) * 9), "header claims"),
    "huge header": (
        lambda p: p.write_bytes((200 * 2**20).to_bytes(8, "little") + b"{}"),
        "more than the 104857600 allowed",
    ),
    "header longer than the file": (
        lambda p: p.write_bytes((1000).to_bytes(8, "little") + b"{}"),
        "claims 1000 bytes, the file has 10",
    ),
    "not JSON": (lambda p: raw_file(p, b"{oops}", b""), "not valid JSON"),
    "deeply nested": (lambda p: raw_file(p, b"[" * 200_000, b""), "not valid JSON"),
    "a list": (lambda p: raw_file(p, b"[]", b""), "not a JSON object"),
    "overlap": (
        lambda p: raw_file(
            p, {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)
        ),
        "not a whole safetensors file",
    ),
    "hole": (
        lambda p: raw_file(
            p, {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)
        ),
        "not a whole safetensors file",
    ),
    "shape and bytes differ": (
        lambda p: raw_file(p, {"a": entry("F32", [3], 0, 8)}, bytes(8)),
        "not a whole safetensors file",
    ),
    "offsets beyond the end": (
        lambda p: raw_file(p, {"a": entry("F32", [4], 0, 16)}, bytes(8)),
        "not a whole safetensors file",
    ),
    "negative offset": (
        lambda p: raw_file(p, {"a": entry("F32", [1], -4, 0)}, bytes(4)),
        "not a whole safetensors file",
    ),
    "same name twice": (
        lambda p: raw_file(
            p,
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"\0",
        ),
        "occurs twice",
    ),
    "complex numbers": (
        lambda p: save_file({"a": torch.zeros(2, dtype=torch.complex64)}, p),
        "dtype C64, which this package does not read",
    ),
    "torch.save": (_zip_pickle, "pickle file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "pickle file"),
    "Git LFS pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "folder": (lambda p: p.mkdir(), "not a regular file"),
    "pipe": (lambda p: os.mkfifo(p), "not a regular file"),
    "missing": (lambda p: None, "No such file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    write, message = BAD_FILES[kind]
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        MappedFile(path)
    assert str(path) in str(caught.value)


OPEN_LIMITED = """
import resource, sys
from neounify.checkpoint import MappedFile
from neounify.errors import CheckpointError
which = getattr(resource, sys.argv[2])
resource.setrlimit(which, (2**32, 2**32))
try:
    MappedFile(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_file_beyond_the_limit_of_the_process_is_one_error(tmp_path: Path, limit: str) -> None:
    path = tmp_path / "large.safetensors"
    size = 2**33
    raw_file(path, {"x": entry("U8", [size], 0, size)}, b"")
    os.truncate(path, path.stat().st_size + size)
    command = [sys.executable, "-c", OPEN_LIMITED, str(path), limit]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "cannot be mapped within the limit of address space or of data" in done.stdout


@pytest.mark.timeout(60)
def test_any_flipped_header_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "flipped.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(3, dtype=torch.int8)}, path)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole) - 19):
        for value in (0x7B, whole[position] ^ 1):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                file = MappedFile(path)
                for name in file.tensors:
                    file.tensor(name)
            except CheckpointError:
                refused += 1
    assert refused > len(whole)
