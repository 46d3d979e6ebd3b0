"""Quantised linear weights in safetensors files: which tensors belong together.

A module NAME has codes `NAME.weight` and, in one of these conventions, what they are scaled by:

| codes | beside them | named by |
|---|---|---|
| I8 | `NAME.weight_scale` F32 [N, 1] or [] | `NAME.comfy_quant`, or the file's metadata |
| F8_E4M3 | `NAME.weight_scale` F32 [N, 1] or [] | the same |
| F8_E4M3 | `NAME.scale_weight` F32 [] | the name alone; `scaled_fp8` and `scale_input` beside it |
| I8 or U8, two codes per byte | `NAME.weight_s_rel`, `_s_channel`, `_codebook` | as the first |

`comfy_quant` is a U8 tensor with JSON, such as
{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}; the metadata key
`_quantization_metadata` holds the same for all modules, {"layers": {NAME: {…}}}. Keys that are not
known are kept. Everything is untrusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.errors import CheckpointError
from neounify.files import parse_json_object
from neounify.quant.formats import (
    CHANNEL,
    CODEBOOK,
    CODES,
    RELATIVE,
    SCALE,
    FourBits,
    Fp8Rows,
    Int8Rows,
    PublishedFormat,
    Shape,
    WeightFormat,
    decode,
    rows_of,
)
from neounify.quant.rotation import group_size, is_group
from neounify.quant.w4 import GROUP, LEVELS

FORMATS: Mapping[str, tuple[torch.dtype, ...]] = {
    Int8Rows.name: (torch.int8,),
    Fp8Rows.name: (torch.float8_e4m3fn,),
    FourBits.name: (torch.int8, torch.uint8),
}
"""Format → dtypes of its codes."""
METADATA = "_quantization_metadata"
MAX_DESCRIPTION = 4096
MAX_METADATA = 16 * 2**20
MARKER = "scaled_fp8"
DESCRIPTION, _OLD_SCALE = "comfy_quant", "scale_weight"
_INPUT_SCALES = ("input_scale", "scale_input")
PARTS = (DESCRIPTION, SCALE, _OLD_SCALE, RELATIVE, CHANNEL, CODEBOOK, *_INPUT_SCALES)
"""Names of a module's tensors beside its codes; scales of activations are not used."""

ReadTensor = Callable[[str], Tensor]
Headers = Mapping[str, tuple[Shape, torch.dtype]]


@dataclass(frozen=True)
class StoredCodes:
    """A quantised weight of a file: its format, its shape [N, K], and what its codes need.

    `beside` are the tensors of the format without the codes, checked; scales have a value per row.
    """

    format: WeightFormat
    shape: Shape
    beside: Mapping[str, Tensor]

    @property
    def label(self) -> str:
        """The format in a few words: "int8_tensorwise, rotated"."""
        return f"{self.format.name}{', rotated' * (self.format.group > 1)}"

    @property
    def bytes_beside(self) -> int:
        """Bytes of the tensors beside the codes."""
        return sum(tensor.nbytes for tensor in self.beside.values())

    def decode(self, codes: Tensor, start: int) -> Float[Tensor, "rows k"]:
        """Ŵ of the rows from `start` on, float32 on the device of the codes."""
        beside = rows_of(self.beside, slice(start, start + codes.shape[0]))
        tensors = {name: tensor.to(codes.device) for name, tensor in beside.items()}
        return decode(self.format, tensors | {CODES: codes})


def described(names: Iterable[str], quantised: Mapping[str, StoredCodes]) -> set[str]:
    """Those of a checkpoint's tensors that only describe its quantised weights."""
    beside = {f"{weight.removesuffix(CODES)}{part}" for weight in quantised for part in PARTS}
    return {name for name in names if name == MARKER or name in beside}


def description_tensor(format: PublishedFormat) -> Tensor:
    """The tensor `comfy_quant` of a module: UTF-8 JSON that names the format.

    Raises CheckpointError where kept keys make it longer than `MAX_DESCRIPTION`, which is not read.
    """
    text = json.dumps(format.describe(), separators=(",", ":")).encode()
    if len(text) > MAX_DESCRIPTION:
        raise CheckpointError(
            f"the description of a weight in {format.name} has {len(text):,} bytes with the keys "
            f"{', '.join(format.extra)[:200]}; at most {MAX_DESCRIPTION:,} can be written"
        )
    return torch.tensor(list(text), dtype=torch.uint8)


def read_quantised(
    path: Path,
    shapes: Headers,
    metadata: Iterable[Mapping[str, str]],
    read: ReadTensor,
    rename: Callable[[str], str],
) -> dict[str, StoredCodes]:
    """Name of each quantised weight → what it is.

    `shapes` are those of all tensors, `metadata` that of each file, `read` gives a tensor; `rename`
    takes the prefix off a name of the metadata. Raises CheckpointError for formats that are not
    known, for scales that are missing, not finite or of another shape, and for two descriptions of
    one weight.
    """
    layers: dict[str, dict[str, Any]] = {}
    for described in (_described_in_metadata(path, one) for one in metadata):
        for name, description in described.items():
            if layers.setdefault(rename(name), description) != description:
                raise CheckpointError(f"{path}: {METADATA} describes {name[:200]!r} in two ways")
    modules = {name.rpartition(".")[0] for name in shapes if name.rpartition(".")[2] in PARTS}
    quantised: dict[str, StoredCodes] = {}
    for module in sorted(modules | layers.keys()):
        weight = f"{module}.{CODES}"
        if weight not in shapes:
            raise CheckpointError(
                f"{path}: {module[:200]!r} is described as quantised, but its weight is not there"
            )
        description = layers.get(module, {})
        if f"{module}.{DESCRIPTION}" in shapes:
            description = _description(path, f"{module}.{DESCRIPTION}", shapes, read)
            if layers.get(module, description) != description:
                raise CheckpointError(
                    f"{path}: {module[:200]!r} is described in two ways, by its {DESCRIPTION} and "
                    f"by {METADATA}"
                )
        quantised[weight] = _Module(path, module, description, shapes, read).codes()
    return quantised


def _described_in_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    text = metadata.get(METADATA)
    if text is None:
        return {}
    if len(text) > MAX_METADATA:
        raise CheckpointError(f"{path}: {METADATA} has {len(text):,} characters, too many to read")
    layers = parse_json_object(text.encode(), path, CheckpointError).get("layers")
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise CheckpointError(f"{path}: {METADATA} must hold an object of objects, 'layers'")
    return layers


def _description(path: Path, name: str, shapes: Headers, read: ReadTensor) -> dict[str, Any]:
    shape, dtype = shapes[name]
    if dtype != torch.uint8 or len(shape) != 1 or shape[0] > MAX_DESCRIPTION:
        raise CheckpointError(
            f"{path}: {name!r} must be at most {MAX_DESCRIPTION} bytes of JSON in U8, it is "
            f"{list(shape)} of {dtype}"
        )
    return parse_json_object(bytes(read(name).tolist()), path, CheckpointError)


@dataclass(frozen=True)
class _Module:
    """One module of a file with its description, being checked."""

    path: Path
    name: str
    description: Mapping[str, Any]
    shapes: Headers
    read: ReadTensor

    def codes(self) -> StoredCodes:
        """What the module holds. Raises CheckpointError."""
        format = self._format()
        rows, columns = self.shapes[f"{self.name}.{CODES}"][0]
        if format == FourBits.name:
            return self._four_bits(rows, 2 * columns)
        scale = {SCALE: self._row_scale(rows)}
        if format == Int8Rows.name:
            group = self._group(columns, default=False)
            return StoredCodes(Int8Rows(group, self._extra()), (rows, columns), scale)
        if self._group(columns, default=False) > 1:
            raise CheckpointError(
                f"{self.path}: convrot of {self.name!r} is true, but weights in {format} are not "
                f"rotated, only those in {Int8Rows.name} and {FourBits.name}"
            )
        return StoredCodes(Fp8Rows(self._extra()), (rows, columns), scale)

    def _format(self) -> str:
        """The name of the format, whose codes these are, in two dimensions."""
        format = self.description.get("format")
        if format is not None and (not isinstance(format, str) or format not in FORMATS):
            raise CheckpointError(
                f"{self.path}: {self.name!r} is quantised in the format {str(format)[:80]!r}, "
                f"which is not known; known are {', '.join(FORMATS)}"
            )
        shape, dtype = self.shapes[f"{self.name}.{CODES}"]
        # Without a name only forms with a scale per row are meant.
        named = [format] if format else [Int8Rows.name, Fp8Rows.name]
        fitting = [name for name in named if dtype in FORMATS[name]]
        # Rows without a channel take no bytes, so nothing bounds their number.
        if not fitting or len(shape) != 2 or not shape[1]:
            dtypes = [str(dtype) for name in named for dtype in FORMATS[name]]
            raise CheckpointError(
                f"{self.path}: codes of {self.name!r} are {list(shape)} of {dtype}; expected "
                f"[out, in] of {' or '.join(dtypes)}{f' for {format}' if format else ''}"
            )
        return fitting[0]

    def _four_bits(self, rows: int, columns: int) -> StoredCodes:
        if columns % GROUP:
            raise CheckpointError(
                f"{self.path}: {self.name!r} in {FourBits.name} has rows of {columns} codes; "
                f"expected a multiple of {GROUP}"
            )
        group = self._group(columns, default=True)
        codebook = f"{self.name}.{CODEBOOK}" in self.shapes
        format = FourBits(group, codebook, self._extra())
        layout = format.layout((rows, columns))
        beside = {name: self._tensor(name, *layout[name]) for name in layout if name != CODES}
        levels = beside.get(CODEBOOK, torch.zeros(LEVELS))
        if not bool(torch.isfinite(levels).all()) or bool((levels.diff() < 0).any()):
            raise CheckpointError(
                f"{self.path}: the {LEVELS} levels of {self.name}.{CODEBOOK} must be finite and "
                "sorted"
            )
        # s_rel is as large as a part of the codes, and checked with them when it is read.
        self._check_scale(CHANNEL, beside[CHANNEL])
        return StoredCodes(format, (rows, columns), beside)

    def _extra(self) -> dict[str, Any]:
        """Keys of the description that mean nothing here, which are kept."""
        known = ("format", "convrot", "convrot_groupsize")
        return {key: value for key, value in self.description.items() if key not in known}

    def _tensor(self, part: str, wanted: Shape, wanted_dtype: torch.dtype) -> Tensor:
        name = f"{self.name}.{part}"
        if name not in self.shapes:
            raise CheckpointError(
                f"{self.path}: quantised {self.name!r} has no {part}, which its format "
                f"{FourBits.name} needs"
            )
        shape, dtype = self.shapes[name]
        if shape != wanted or dtype != wanted_dtype:
            raise CheckpointError(
                f"{self.path}: {name!r} is {list(shape)} of {dtype}; expected {list(wanted)} of "
                f"{wanted_dtype} for {FourBits.name}"
            )
        return self.read(name)

    def _row_scale(self, rows: int) -> Tensor:
        """The scale of each row [N, 1], from one for all or one for each."""
        parts = [part for part in (SCALE, _OLD_SCALE) if f"{self.name}.{part}" in self.shapes]
        if len(parts) != 1:
            count = "no scale" if not parts else "two scales"
            raise CheckpointError(
                f"{self.path}: quantised {self.name!r} has {count}; expected {self.name}.{SCALE}"
            )
        name = f"{self.name}.{parts[0]}"
        shape, dtype = self.shapes[name]
        if shape not in ((), (1,), (1, 1), (rows, 1)) or dtype != torch.float32:
            raise CheckpointError(
                f"{self.path}: {name!r} is {list(shape)} of {dtype}; expected [] or [{rows}, 1] "
                "of float32"
            )
        scale = self.read(name)
        self._check_scale(parts[0], scale)
        return scale.reshape(-1, 1).expand(rows, 1).contiguous()

    def _check_scale(self, part: str, scale: Tensor) -> None:
        if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
            raise CheckpointError(
                f"{self.path}: {f'{self.name}.{part}'!r} holds scales that are negative or not "
                "finite"
            )

    def _group(self, channels: int, *, default: bool) -> int:
        """Channels of a rotated group, 1 without rotation; `default` where nothing is said."""
        rotated = self.description.get("convrot", default)
        if not isinstance(rotated, bool):
            raise CheckpointError(
                f"{self.path}: convrot of {self.name!r} must be true or false: {rotated!r}"
            )
        if not rotated:
            return 1
        size = self.description.get("convrot_groupsize", group_size(channels))
        if isinstance(size, bool) or not isinstance(size, int) or not is_group(size, channels):
            raise CheckpointError(
                f"{self.path}: convrot_groupsize {str(size)[:40]} of {self.name!r} must be a power "
                f"of 4 from 4 to 256 that divides its {channels} channels"
            )
        return size
