"""Formats of quantised weights: which tensors stand for a weight [N, K], and back.

The tensors of a module have these names, here and in files, in front of which stands the module's:

| name | `int8_tensorwise` | `float8_e4m3fn` | `asym_w4a8_int8` |
|---|---|---|---|
| weight | I8 [N, K] | F8_E4M3 [N, K] | I8 [N, K / 2] |
| weight_scale | F32 [N, 1] | F32 [N, 1] | |
| weight_s_rel | | | F8_E4M3 [N, K / 16] |
| weight_s_channel | | | F32 [N] |
| weight_codebook | | | F32 [16], may be missing |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from neounify.quant.fp8 import dequantise_fp8, quantise_fp8
from neounify.quant.int8 import dequantise_int8, quantise_int8
from neounify.quant.rotation import rotate_groups
from neounify.quant.w4 import GROUP, LEVELS, dequantise_w4, quantise_w4, row_scale, unpack_w4

CODES, SCALE = "weight", "weight_scale"
RELATIVE, CHANNEL, CODEBOOK = "weight_s_rel", "weight_s_channel", "weight_codebook"

SLICE_ELEMENTS = 2**18
"""Elements that are quantised at a time: 1 MB in float32, which stays in a cache."""

Shape: TypeAlias = tuple[int, ...]
Tensors: TypeAlias = Mapping[str, Tensor]


class WeightFormat(Protocol):
    """What a weight [N, K] is stored as. Each tensor but the codebook has a row per row of it."""

    @property
    def name(self) -> str:
        """The format as files and messages name it."""

    @property
    def group(self) -> int:
        """Channels that are rotated together; 1 without rotation."""

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each tensor of a weight [N, K]."""

    def dequantise(self, tensors: Tensors) -> Float[Tensor, "n k"]:
        """Ŵ of some rows in float32, rotated as it was quantised."""


@dataclass(frozen=True)
class Int8Rows:
    """8 bits with a scale per row; `extra` are keys of its description that mean nothing here."""

    group: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    name = "int8_tensorwise"

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {CODES: (shape, torch.int8), SCALE: ((shape[0], 1), torch.float32)}

    def quantise(self, weight: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        codes, scale = quantise_int8(weight, self.group)
        return {CODES: codes, SCALE: scale}

    def dequantise(self, tensors: Tensors) -> Float[Tensor, "n k"]:
        return dequantise_int8(tensors[CODES], tensors[SCALE])

    def int8(self, tensors: Tensors) -> tuple[Int8[Tensor, "n k"], Float[Tensor, "n 1"]]:
        """Codes in int8 and the scale of each row."""
        return tensors[CODES], tensors[SCALE]

    def describe(self) -> dict[str, Any]:
        """The description of the format in a file."""
        return {"format": self.name} | _rotation(self.group) | dict(self.extra)


@dataclass(frozen=True)
class Fp8Rows:
    """e4m3 with a scale per row."""

    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    name = "float8_e4m3fn"
    group = 1

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {CODES: (shape, torch.float8_e4m3fn), SCALE: ((shape[0], 1), torch.float32)}

    def quantise(self, weight: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        codes, scale = quantise_fp8(weight)
        return {CODES: codes, SCALE: scale}

    def dequantise(self, tensors: Tensors) -> Float[Tensor, "n k"]:
        return dequantise_fp8(tensors[CODES], tensors[SCALE])

    def describe(self) -> dict[str, Any]:
        """The description of the format in a file."""
        return {"format": self.name} | dict(self.extra)


@dataclass(frozen=True)
class FourBits:
    """4 bits with levels, scales of groups and of rows, that decode to int8 rows."""

    group: int = 1
    codebook: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    name = "asym_w4a8_int8"

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, columns = shape
        tensors: dict[str, tuple[Shape, torch.dtype]] = {
            CODES: ((rows, columns // 2), torch.int8),
            RELATIVE: ((rows, columns // GROUP), torch.float8_e4m3fn),
            CHANNEL: ((rows,), torch.float32),
        }
        return tensors | ({CODEBOOK: ((LEVELS,), torch.float32)} if self.codebook else {})

    def quantise(self, weight: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        parts = quantise_w4(weight, self.group)
        return dict(zip((CODES, RELATIVE, CHANNEL, CODEBOOK), parts, strict=True))

    def dequantise(self, tensors: Tensors) -> Float[Tensor, "n k"]:
        codes, relative, channel = (tensors[name] for name in (CODES, RELATIVE, CHANNEL))
        return dequantise_w4(codes, relative, channel, tensors.get(CODEBOOK))

    def int8(self, tensors: Tensors) -> tuple[Int8[Tensor, "n k"], Float[Tensor, "n 1"]]:
        """Codes in int8 and the scale of each row."""
        codes = unpack_w4(tensors[CODES], tensors[RELATIVE], tensors.get(CODEBOOK))
        return codes, row_scale(tensors[RELATIVE], tensors[CHANNEL])

    def describe(self) -> dict[str, Any]:
        """The description of the format in a file."""
        return {"format": self.name} | _rotation(self.group) | dict(self.extra)


PublishedFormat: TypeAlias = Int8Rows | Fp8Rows | FourBits
"""A format of the published conventions, which this package writes too."""


def quantise_rows(
    format: PublishedFormat,
    shape: Shape,
    device: torch.device,
    read: Callable[[range], Float[Tensor, "rows k"]],
) -> dict[str, Tensor]:
    """The tensors of a weight [N, K] of which `read` gives some rows, on a device.

    Formats of rows are quantised some rows at a time, so that little more than the codes is in
    memory; levels of 4 bits are fitted to all of them.
    """
    rows, columns = shape
    # Before all intermediate results: allocated behind them, codes would keep what these leave
    # from being used again.
    tensors = {
        name: torch.empty(size, dtype=dtype, device=device)
        for name, (size, dtype) in format.layout(shape).items()
    }
    whole = isinstance(format, FourBits)
    step = rows if whole else max(1, SLICE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        part = range(start, min(start + step, rows))
        for name, values in format.quantise(read(part)).items():
            into = tensors[name] if whole else tensors[name][part.start : part.stop]
            into.copy_(values)
    return tensors


def rows_of(tensors: Tensors, rows: slice | Tensor) -> dict[str, Tensor]:
    """The tensors of some rows of a weight, a slice of them or by their numbers."""
    return {name: t if name == CODEBOOK else t[rows] for name, t in tensors.items()}


def decode(format: WeightFormat, tensors: Tensors) -> Float[Tensor, "n k"]:
    """Ŵ of some rows in float32, rotated back."""
    rows = format.dequantise(tensors)
    return rows if format.group == 1 else rotate_groups(rows, format.group)


def _rotation(group: int) -> dict[str, Any]:
    # Said without a rotation too: readers take a format that does not say for one or the other.
    return {"convrot": True, "convrot_groupsize": group} if group > 1 else {"convrot": False}
