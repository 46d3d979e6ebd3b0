"""One safetensors or GGUF file, untrusted, memory-mapped: its tensors are views of the file.

The mapping is private and copy-on-write: writing to such a tensor never reaches
the file. Pages that were only read can be dropped from memory at any time
(`release`); the next touch reads them from the file again.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import platform
import stat
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neounify.errors import CheckpointError

if TYPE_CHECKING:  # GGUF is read by few, and its formats are imported for them alone.
    from neounify.quant.blocks import BlockFormat

MAX_HEADER_BYTES = 100 * 2**20
MAX_BUFFERS = 512
"""Buffers of one system call; Linux allows 1,024."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

GGUF_START = b"GGUF"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: its shape, dtype, and bytes `start`..`stop` of `file`.

    The values of a GGUF file in `blocks` have the dtype uint8, and the shape of what they mean.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    stop: int
    blocks: BlockFormat | None = None

    @property
    def format(self) -> str:
        """Name of the dtype or of the block format: "F32", "I8", "Q4_K"."""
        return DTYPE_NAMES[self.dtype] if self.blocks is None else self.blocks.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor; that of blocks is [rows, bytes of a row].

        A row is one block where the rows of the values are not whole blocks.
        """
        if self.blocks is None:
            return self.shape
        whole = self.numel // self.shape[0] % self.blocks.elements == 0
        rows = self.shape[0] if whole else self.numel // self.blocks.elements
        return rows, self.nbytes // rows

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class MappedFile:
    """A validated, memory-mapped safetensors or GGUF file. Safe to share between threads.

    Raises CheckpointError when the file is missing, truncated, of another kind, or
    holds a dtype this package does not read. Nothing in it is ever unpickled.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header, self._map, self._descriptor = _open(self.path)
        weakref.finalize(self, os.close, self._descriptor)
        self.metadata: Mapping[str, str] = {}
        if header is None:
            from neounify.checkpoint.gguf import read_gguf

            self.tensors: Mapping[str, TensorInfo] = read_gguf(self.path, self._map)
            return
        self.metadata = header.pop("__metadata__", None) or {}
        data_start = 8 + int.from_bytes(self._map[:8], "little")
        self.tensors = {name: self._info(name, entry, data_start) for name, entry in header.items()}

    def is_view(self, name: str) -> bool:
        """Whether `tensor(name)` is a view of the file (else its bytes are not aligned)."""
        info = self.tensors[name]
        return info.nbytes > 0 and info.start % info.dtype.itemsize == 0

    def tensor(self, name: str) -> Tensor:
        """The tensor: a view of the mapping, or a copy where the file does not align it.

        Blocks of a GGUF file are uint8, as `stored_shape` says. The view keeps the mapping alive.
        KeyError for an unknown name.
        """
        info = self.tensors[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if self.is_view(name):
            count = info.nbytes // info.dtype.itemsize
            flat = torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=info.start)
        else:
            flat = torch.frombuffer(bytearray(self._map[info.start : info.stop]), dtype=info.dtype)
        return flat.view(info.stored_shape)

    def head(self, name: str, count: int) -> bytes:
        """The first `count` bytes the file holds of a tensor (fewer where it is shorter).

        Read past the mapping: one page at a place costs one page, where touching a mapped one
        makes the system read megabytes around it.
        """
        info = self.tensors[name]
        return os.pread(self._descriptor, min(count, info.nbytes), info.start)

    def check_length(self) -> None:
        """Raise CheckpointError when the file has been cut off since it was opened."""
        length = os.fstat(self._descriptor).st_size
        if length < len(self._map):
            raise CheckpointError(
                f"{self.path} was cut off while it was in use: it has {length} of "
                f"{len(self._map)} bytes; restore it and load the model again"
            )

    def read_into(self, start: int, targets: Sequence[memoryview]) -> None:
        """Read bytes from `start` on into buffers, one after the other, without the mapping.

        Raises CheckpointError for a file that ends before they are full or cannot be read.
        """
        left = [target for target in targets if target.nbytes]
        while left:
            try:
                count = os.preadv(self._descriptor, left[:MAX_BUFFERS], start)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read at byte {start}: {error.strerror}"
                ) from error
            if not count:
                self.check_length()
                raise CheckpointError(f"{self.path} ends at byte {start}, in the middle of a layer")
            start += count
            while left and count >= left[0].nbytes:
                count -= left.pop(0).nbytes
            if count:
                left[0] = left[0][count:]

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Drop the pages of a tensor, or of its bytes `start`..`stop`, from resident memory.

        Only whole pages inside the range are dropped, so neighbours are not touched.
        Values written to a view of the range are lost: it reads as the file again.
        """
        info = self.tensors[name]
        end = info.stop if stop is None else min(info.stop, info.start + stop)
        self.release_ranges([(info.start + start, end)])

    def release_ranges(self, ranges: Iterable[tuple[int, int]]) -> None:
        """`release` for byte ranges (start, stop) of the file; touching ranges count as one."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for start, stop in _joined(ranges):
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            # The tail of the file's last page holds nothing, so that page is whole too.
            last = stop if stop == len(self._map) else stop // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _info(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        try:
            code, shape = entry["dtype"], tuple(entry["shape"])
            start, stop = (data_start + offset for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path, f"its header entry of {name!r} is malformed") from error
        dtype = DTYPES.get(code)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {code}, which this package does not read; "
                f"it reads {', '.join(DTYPES)}"
            )
        if not data_start <= start <= stop <= len(self._map):
            raise _damaged(self.path, f"tensor {name!r} lies outside the file")
        if math.prod(shape) * dtype.itemsize != stop - start:
            raise _damaged(
                self.path,
                f"tensor {name!r} of shape {shape} does not fill its {stop - start} bytes",
            )
        return TensorInfo(shape, dtype, self.path, start, stop)


def _open(path: Path) -> tuple[dict[str, Any] | None, mmap.mmap, int]:
    """(header of a safetensors file or None of a GGUF file, mapping, descriptor)."""
    try:
        # A pipe or a device would block or never end; look before opening.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with path.open("rb") as file:
            start, header = file.read(8), None
            if not start.startswith(GGUF_START):
                header = _read_header(path, start, file)
                _validate(path)
            mapping = _map(file.fileno())
            descriptor = os.dup(file.fileno())
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
            raise CheckpointError(
                f"{path}: its {path.stat().st_size:,} bytes cannot be mapped within the limit of "
                "address space or of data of this process; raise it (ulimit -v, ulimit -d)"
            ) from error
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return header, mapping, descriptor


def _read_header(path: Path, start: bytes, file: Any) -> dict[str, Any]:
    if start.startswith(_PICKLE_STARTS):
        raise CheckpointError(
            f"{path} is a pickle file (a PyTorch .bin or .pt). Reading one can run code, so it is "
            "never opened; convert it to .safetensors where it came from"
        )
    if start.startswith(b"version "):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
        )
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {start!r}, not b'GGUF'")
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise _damaged(path, f"it is only {size} bytes long")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(
            path, f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed"
        )
    if 8 + length > size:
        raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key occurs twice")
    return document


def _validate(path: Path) -> None:
    """The safetensors library's own checks: offsets without holes or overlaps, exact length."""
    try:
        # Through numpy: for torch, the library would reserve memory for the whole file.
        with safe_open(str(path), framework="np"):
            pass
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _map(descriptor: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    # Without NORESERVE, Linux refuses a copy-on-write mapping of a file larger than the memory,
    # although nothing is ever written to it. Python 3.13 is the first to name the flag.
    common = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64")
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if common else 0)
    return mmap.mmap(
        descriptor,
        0,
        flags=mmap.MAP_PRIVATE | no_reserve,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole safetensors file: {why}; download or write it again"
    )


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def all_finite(values: Tensor) -> bool:
    """False when any value is NaN or infinite. Any floating dtype, any shape."""
    if values.numel() == 0:
        return True
    if values.dtype.itemsize == 1:
        values = values.to(torch.bfloat16)
    # The extremes carry NaN and infinity along and need no memory, unlike isfinite().
    return all(math.isfinite(float(bound)) for bound in values.aminmax())
