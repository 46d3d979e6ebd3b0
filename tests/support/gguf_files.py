"""GGUF files for tests, written without the code under test, damaged ones too."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

F32, F16, BF16 = 0, 1, 30
STRING, ARRAY = 8, 9
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
PLAIN = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


@dataclass
class Stored:
    """A tensor as the file describes it; None of an offset is the next free one."""

    dimensions: Sequence[int]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class GgufFile:
    """All fields of a file; counts and version as claimed, None for the true ones."""

    tensors: list[tuple[str | bytes, Stored]]
    pairs: list[tuple[str, bytes]] = field(default_factory=list)
    alignment: int = 32
    version: int = 3
    claimed_tensors: int | None = None
    claimed_pairs: int | None = None

    def content(self) -> bytes:
        tensors = len(self.tensors) if self.claimed_tensors is None else self.claimed_tensors
        pairs = len(self.pairs) if self.claimed_pairs is None else self.claimed_pairs
        header = b"GGUF" + struct.pack("<IQQ", self.version, tensors, pairs)
        for key, value in self.pairs:
            header += text(key) + value
        data = b""
        for name, stored in self.tensors:
            data += b"\0" * (-len(data) % self.alignment)
            offset = len(data) if stored.offset is None else stored.offset
            data += stored.data
            sizes = struct.pack(f"<{len(stored.dimensions)}Q", *stored.dimensions)
            header += text(name) + struct.pack("<I", len(stored.dimensions)) + sizes
            header += struct.pack("<IQ", stored.kind, offset)
        return header + b"\0" * (-len(header) % self.alignment) + data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.content())
        return path


def text(value: str | bytes) -> bytes:
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def value(kind: int, *numbers: Any) -> bytes:
    """A number or text of this type, or an array of several."""
    if len(numbers) == 1:
        return struct.pack("<I", kind) + _element(kind, numbers[0])
    return array(kind, *numbers)


def array(kind: int, *elements: Any) -> bytes:
    head = struct.pack("<IIQ", ARRAY, kind, len(elements))
    return head + b"".join(_element(kind, element) for element in elements)


def _element(kind: int, element: Any) -> bytes:
    return text(element) if kind == STRING else struct.pack(f"<{CODES[kind]}", element)


def plain(tensor: Tensor) -> Stored:
    """A tensor in its dtype."""
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return Stored(tensor.shape[::-1], PLAIN[tensor.dtype], raw)


def blocks(tensor: Tensor, kind: str) -> tuple[Stored, np.ndarray[Any, Any]]:
    """A tensor in blocks as the `gguf` package writes them, and the values it reads again."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    codes = gguf.quants.quantize(tensor.float().numpy(), number)
    meant = gguf.quants.dequantize(codes, number)
    return Stored(tensor.shape[::-1], int(number), codes.tobytes()), meant


def random_blocks(shape: Sequence[int], kind: str) -> tuple[Stored, np.ndarray[Any, Any]]:
    """Random codes of a format that the `gguf` package cannot write, and their values."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[number]
    count = int(np.prod(shape)) // elements
    codes = np.random.default_rng(0).integers(0, 256, (count, nbytes), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for at in halves[kind]:
        codes[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    meant = gguf.quants.dequantize(codes, number).reshape(shape)
    return Stored(tuple(shape[::-1]), int(number), codes.tobytes()), meant


def gguf_of(weights: Mapping[str, Tensor], prefix: str = "", **fields: Any) -> GgufFile:
    """A file of plain tensors."""
    return GgufFile([(prefix + name, plain(tensor)) for name, tensor in weights.items()], **fields)
