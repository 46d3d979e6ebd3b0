"""Quantised linear weights in safetensors files: which tensors belong together, and Ŵ from codes.

A module NAME has codes `NAME.weight` [N, K] in 8 bits and a scale, in one of these conventions:

| codes | scale | named by |
|---|---|---|
| I8 | `NAME.weight_scale` F32 [N, 1] or [] | `NAME.comfy_quant`, or the file's metadata |
| F8_E4M3 | `NAME.weight_scale` F32 [N, 1] or [] | the same |
| F8_E4M3 | `NAME.scale_weight` F32 [] | the name alone; `scaled_fp8` and `scale_input` beside it |

`comfy_quant` is a U8 tensor with JSON, such as
{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}; the metadata key
`_quantization_metadata` holds the same for all modules, {"layers": {NAME: {…}}}. Everything is
untrusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.errors import CheckpointError
from neounify.files import parse_json_object
from neounify.quant.rotation import group_size, is_group, rotate_groups

FORMATS = {"int8_tensorwise": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
"""Format → dtype of its codes."""
METADATA = "_quantization_metadata"
MAX_DESCRIPTION = 4096
MAX_METADATA = 16 * 2**20
MARKER = "scaled_fp8"
_DESCRIPTION, _SCALE, _OLD_SCALE = "comfy_quant", "weight_scale", "scale_weight"
_INPUT_SCALES = ("input_scale", "scale_input")
PARTS = (_DESCRIPTION, _SCALE, _OLD_SCALE, *_INPUT_SCALES)
"""Names of a module's tensors beside its codes; scales of activations are not used."""

Shape = tuple[int, ...]
ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True)
class RowCodes:
    """Codes of a weight: Ŵ = scale · codes, each group of `group` channels rotated back (1: none).

    `scale` is float32 [N, 1], a scale per row.
    """

    scale: Float[Tensor, "n 1"]
    group: int = 1

    def decode(self, codes: Tensor, start: int) -> Float[Tensor, "rows k"]:
        """Ŵ of the rows from `start` on, float32 on the device of the codes."""
        scale = self.scale[start : start + codes.shape[0]].to(codes.device)
        rows = codes.float() * scale
        return rows if self.group == 1 else rotate_groups(rows, self.group)


def described(names: Iterable[str], quantised: Mapping[str, RowCodes]) -> set[str]:
    """Those of a checkpoint's tensors that only describe its quantised weights."""
    beside = {f"{weight.removesuffix('weight')}{part}" for weight in quantised for part in PARTS}
    return {name for name in names if name == MARKER or name in beside}


def read_quantised(
    path: Path,
    shapes: Mapping[str, tuple[Shape, torch.dtype]],
    metadata: Mapping[str, str],
    read: ReadTensor,
    rename: Callable[[str], str],
) -> dict[str, RowCodes]:
    """Name of each quantised weight → how it is decoded.

    `shapes` are those of all tensors, `read` gives one; `rename` takes the prefix off a name of the
    metadata. Raises CheckpointError for formats that are
    not known, and for scales that are missing, not finite or of another shape.
    """
    layers = {rename(name): v for name, v in _described_in_metadata(path, metadata).items()}
    modules = {name.rpartition(".")[0] for name in shapes if name.rpartition(".")[2] in PARTS}
    quantised: dict[str, RowCodes] = {}
    for module in sorted(modules | layers.keys()):
        weight = f"{module}.weight"
        if weight not in shapes:
            raise CheckpointError(
                f"{path}: {module[:200]!r} is described as quantised, but its weight is not there"
            )
        names = {part for part in PARTS if f"{module}.{part}" in shapes}
        if _DESCRIPTION in names:
            description = _description(path, f"{module}.{_DESCRIPTION}", shapes, read)
        else:
            description = layers.get(module, {})
        shape, dtype = shapes[weight]
        _check_format(path, module, description, dtype, shape)
        scales = [part for part in (_SCALE, _OLD_SCALE) if part in names]
        if len(scales) != 1:
            count = "no scale" if not scales else "two scales"
            raise CheckpointError(
                f"{path}: quantised {module!r} has {count}; expected {module}.{_SCALE}"
            )
        scale = _read_scale(path, f"{module}.{scales[0]}", shape[0], shapes, read)
        quantised[weight] = RowCodes(scale, _group(path, module, description, shape[1]))
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


def _description(
    path: Path, name: str, shapes: Mapping[str, tuple[Shape, torch.dtype]], read: ReadTensor
) -> dict[str, Any]:
    shape, dtype = shapes[name]
    if dtype != torch.uint8 or len(shape) != 1 or shape[0] > MAX_DESCRIPTION:
        raise CheckpointError(
            f"{path}: {name!r} must be at most {MAX_DESCRIPTION} bytes of JSON in U8, it is "
            f"{list(shape)} of {dtype}"
        )
    return parse_json_object(bytes(read(name).tolist()), path, CheckpointError)


def _check_format(
    path: Path, module: str, description: Mapping[str, Any], dtype: torch.dtype, shape: Shape
) -> None:
    """Check that the codes are those of a format this package reads, [N, K]."""
    format = description.get("format")
    if format is not None and (not isinstance(format, str) or format not in FORMATS):
        known = ", ".join(FORMATS)
        raise CheckpointError(
            f"{path}: {module!r} is quantised in the format {str(format)[:80]!r}, which is not "
            f"known; known are {known}"
        )
    fits = dtype in FORMATS.values() if format is None else dtype == FORMATS[format]
    if not fits or len(shape) != 2:
        raise CheckpointError(
            f"{path}: codes of {module!r} are {list(shape)} of {dtype}; expected [out, in] of "
            f"{' or '.join(map(str, FORMATS.values())) if format is None else FORMATS[format]}"
        )


def _read_scale(
    path: Path,
    name: str,
    rows: int,
    shapes: Mapping[str, tuple[Shape, torch.dtype]],
    read: ReadTensor,
) -> Tensor:
    """The scale of each row [N, 1], from one for all or one for each."""
    shape, dtype = shapes[name]
    if shape not in ((), (1,), (1, 1), (rows, 1)) or dtype != torch.float32:
        raise CheckpointError(
            f"{path}: {name!r} is {list(shape)} of {dtype}; expected [] or [{rows}, 1] of float32"
        )
    scale = read(name).clone()
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        raise CheckpointError(f"{path}: {name!r} holds scales that are negative or not finite")
    return scale.reshape(-1, 1).expand(rows, 1)


def _group(path: Path, module: str, description: Mapping[str, Any], channels: int) -> int:
    """Channels of a rotated group; 1 without rotation."""
    rotated = description.get("convrot", False)
    if not isinstance(rotated, bool):
        raise CheckpointError(f"{path}: convrot of {module!r} must be true or false: {rotated!r}")
    if not rotated:
        return 1
    size = description.get("convrot_groupsize", group_size(channels))
    if isinstance(size, bool) or not isinstance(size, int) or not is_group(size, channels):
        raise CheckpointError(
            f"{path}: convrot_groupsize {str(size)[:40]} of {module!r} must be a power of 4 from 4 "
            f"to 256 that divides its {channels} channels"
        )
    return size
