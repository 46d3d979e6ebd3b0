"""The header of a GGUF file, untrusted: where its tensors lie, in which format and shape.

Layout (ggml's `gguf.md`), little-endian: "GGUF", u32 version, u64 tensors, u64 key-value pairs; the
pairs; per tensor its name, u32 number of dimensions, u64 dimensions from the innermost on, u32
type, u64 offset; then, aligned, the data. Lengths are compared with the bytes that are there before
anything is read, so the memory used is a small multiple of the header's size. Values are skipped,
but for the alignment and the shapes `comfy.gguf.orig_shape.NAME` of weights that were stored as
rows of another length.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch

from neounify.checkpoint.mapped import MAX_HEADER_BYTES, TensorInfo
from neounify.errors import CheckpointError
from neounify.quant.blocks import BLOCK_FORMATS, BlockFormat

VERSIONS = (2, 3)
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8
MAX_ALIGNMENT = 2**16
MAX_NESTING = 4
DEFAULT_ALIGNMENT = 32
ALIGNMENT = "general.alignment"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

F32, F16 = 0, 1
PLAIN = {F32: torch.float32, F16: torch.float16, 30: torch.bfloat16}
BLOCKS = {format.number: format for format in BLOCK_FORMATS.values()}
NAMES = ("F32", "F16", "BF16", *BLOCK_FORMATS)

# Types of values: u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64
U32, STRING, ARRAY = 4, 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
INTEGERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
SMALLEST_PAIR = 8 + 4 + 1
SMALLEST_TENSOR = 8 + 4 + 4 + 8


class _Damaged(Exception):
    """The reason why a file is refused."""


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header describes it; `offset` counts from the start of the data."""

    name: str
    dimensions: tuple[int, ...]
    kind: torch.dtype | BlockFormat
    offset: int
    nbytes: int


def read_gguf(path: Path, data: mmap.mmap) -> dict[str, TensorInfo]:
    """Name → shape, format and place of every tensor of the mapped file `path`.

    Shapes are as in the published files, from the outermost dimension on. Raises CheckpointError.
    """
    try:
        return _Header(path, data).tensors()
    except _Damaged as why:
        raise CheckpointError(
            f"{path} is not a whole GGUF file: {why}; download or write it again"
        ) from None


class _Header:
    """A cursor over the header; every method moves it, and raises _Damaged past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4
        self.end = min(len(data), MAX_HEADER_BYTES)

    def tensors(self) -> dict[str, TensorInfo]:
        version = self.integer("I")
        if version not in VERSIONS:
            raise _Damaged(f"it has version {version}, this package reads {VERSIONS}")
        tensors, pairs = self.integer("Q"), self.integer("Q")
        self.check_count(pairs, SMALLEST_PAIR, "values")
        alignment, shapes = self.pairs(pairs)
        self.check_count(tensors, SMALLEST_TENSOR, "tensors")
        entries = [self.entry() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        self.check_places(entries, start, alignment)
        infos = {entry.name: self.info(entry, start, shapes.get(entry.name)) for entry in entries}
        if len(infos) != len(entries):
            raise _Damaged("a tensor is there twice")
        return infos

    def take(self, count: int) -> int:
        """Position of the next `count` bytes."""
        at = self.at
        if count > self.end - at:
            beyond = "the file" if self.end == len(self.data) else f"{self.end} bytes of header"
            raise _Damaged(f"its header needs {count} bytes at {at}, past the end of {beyond}")
        self.at += count
        return at

    def integer(self, code: str) -> int:
        at = self.take(struct.calcsize(f"<{code}"))
        return int(struct.unpack_from(f"<{code}", self.data, at)[0])

    def text(self) -> str:
        """A name."""
        length = self.integer("Q")
        if length > MAX_NAME_BYTES:
            raise _Damaged(f"a name has {length} bytes, more than {MAX_NAME_BYTES}")
        at = self.take(length)
        try:
            return self.data[at : at + length].decode()
        except UnicodeDecodeError as error:
            raise _Damaged(f"a name is not UTF-8 ({error.reason})") from error

    def check_count(self, count: int, smallest: int, what: str) -> None:
        if count * smallest > self.end - self.at:
            raise _Damaged(f"it claims {count} {what}, more than its bytes could hold")

    def pairs(self, count: int) -> tuple[int, dict[str, tuple[int, ...]]]:
        """The alignment, and name of a tensor → the shape it had."""
        alignment, shapes = DEFAULT_ALIGNMENT, {}
        seen: set[str] = set()
        for _ in range(count):
            key, kind = self.text(), self.integer("I")
            if key in seen:
                raise _Damaged(f"the key {key[:80]!r} is there twice")
            seen.add(key)
            if key == ALIGNMENT:
                alignment = self.alignment(kind)
            elif key.startswith(ORIGINAL_SHAPE):
                shapes[key.removeprefix(ORIGINAL_SHAPE)] = self.shape(key, kind)
            else:
                self.skip(kind)
        return alignment, shapes

    def alignment(self, kind: int) -> int:
        value = self.integer(INTEGERS[kind]) if kind in INTEGERS else 0
        if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise _Damaged(f"its alignment must be a power of two to {MAX_ALIGNMENT}, got {value}")
        return value

    def shape(self, key: str, kind: int) -> tuple[int, ...]:
        element = self.integer("I") if kind == ARRAY else -1
        length = self.integer("Q") if kind == ARRAY else 0
        if element not in INTEGERS or not 0 < length <= MAX_DIMENSIONS:
            raise _Damaged(f"{key[:120]!r} must be an array of 1 to {MAX_DIMENSIONS} integers")
        return tuple(self.integer(INTEGERS[element]) for _ in range(length))

    def skip(self, kind: int, depth: int = 0) -> None:
        """Move past a value."""
        if kind in SIZES:
            self.take(SIZES[kind])
        elif kind == STRING:
            self.take(self.integer("Q"))
        elif kind == ARRAY and depth < MAX_NESTING:
            element, length = self.integer("I"), self.integer("Q")
            if element in SIZES:
                self.take(length * SIZES[element])
                return
            self.check_count(length, 8, "elements of an array")
            for _ in range(length):
                self.skip(element, depth + 1)
        else:
            raise _Damaged(f"a value has the type {kind}, which is not known or nested too deep")

    def entry(self) -> _Entry:
        name, count = self.text(), self.integer("I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise _Damaged(f"{name[:200]!r} has {count} dimensions; 1 to {MAX_DIMENSIONS} are read")
        dimensions = tuple(self.integer("Q") for _ in range(count))
        number, offset = self.integer("I"), self.integer("Q")
        kind = PLAIN.get(number) or BLOCKS.get(number)
        if kind is None:
            raise CheckpointError(
                f"{self.path}: tensor {name[:200]!r} has the GGUF type {number}, which this "
                f"package does not read; it reads {', '.join(NAMES)}"
            )
        size, elements = (
            (kind.nbytes, kind.elements) if isinstance(kind, BlockFormat) else (kind.itemsize, 1)
        )
        numel = math.prod(dimensions)
        if not numel or dimensions[0] % elements:
            raise _Damaged(
                f"{name[:200]!r} cannot have the dimensions {_short(dimensions)}: none may be 0, "
                f"and the first must be a multiple of {elements}"
            )
        return _Entry(name, dimensions, kind, offset, numel // elements * size)

    def check_places(self, entries: Sequence[_Entry], start: int, alignment: int) -> None:
        """_Damaged for data that is not aligned, overlaps, or lies outside the file."""
        last, last_name = 0, ""
        for entry in sorted(entries, key=attrgetter("offset")):
            if entry.offset % alignment:
                raise _Damaged(f"{entry.name[:200]!r} is not aligned to {alignment} bytes")
            if entry.offset < last:
                raise _Damaged(f"{entry.name[:200]!r} overlaps {last_name[:200]!r}")
            last, last_name = entry.offset + entry.nbytes, entry.name
            if start + last > len(self.data):
                raise _Damaged(
                    f"{entry.name[:200]!r} ends at byte {start + last}, the file has "
                    f"{len(self.data)}"
                )

    def info(self, entry: _Entry, start: int, original: tuple[int, ...] | None) -> TensorInfo:
        shape = entry.dimensions[::-1]
        if original is not None:
            if min(original) < 1 or math.prod(original) != math.prod(shape):
                raise _Damaged(
                    f"{ORIGINAL_SHAPE}{entry.name[:200]} {_short(original)} does not fit the "
                    f"stored {_short(shape)}"
                )
            shape = original
        begin = start + entry.offset
        stop = begin + entry.nbytes
        if isinstance(entry.kind, BlockFormat):
            return TensorInfo(shape, torch.uint8, self.path, begin, stop, entry.kind)
        return TensorInfo(shape, entry.kind, self.path, begin, stop)


def _short(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)[:200]
