"""Saving of checkpoints as folders with one GGUF file, weight by weight, without a model.

The linear weights of layers are stored in blocks, token embedding and text head in F16, everything
else in F32, which holds norms, biases, patch embeddings, scalar embedders and the image head
without loss. Layers whose rows are not whole blocks are stored in F16.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from neounify.checkpoint.config_json import quantised_entry, with_quantised, write_config
from neounify.checkpoint.gguf import ALIGNMENT, DEFAULT_ALIGNMENT, F16, F32, STRING, U32
from neounify.checkpoint.load import expected_shapes, stored_weights
from neounify.checkpoint.lora_file import LoraSpec, read_loras
from neounify.checkpoint.mapped import GGUF_START, all_finite
from neounify.checkpoint.names import part_of, to_published
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import CHUNK_ELEMENTS, StoredWeight
from neounify.checkpoint.save import SavesFiles, new_checkpoint
from neounify.errors import CheckpointError, RequestError
from neounify.quant.blocks import BLOCK_FORMATS, BlockFormat, BlockRows

ARCHITECTURE = "sensenova_u15"
"""As other tools call this layout."""
VERSION = 3
QUANTISED_PARTS = ("attention", "mlp", "experts")
HALF_PARTS = ("embedding", "lm head")
GGUF_PRESETS = ("f16", *(name.lower() for name, format in BLOCK_FORMATS.items() if format.encode))
"""Formats of layers that can be written."""


def save_gguf(
    checkpoint: CheckpointFolder,
    folder: str | os.PathLike[str],
    preset: str,
    *,
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    tokenizer: SavesFiles | None = None,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write config.json, one GGUF file, the tokenizer's files and `extra_files` (name → text).

    `preset` is the format of the linear weights of layers, such as "q8_0". Memory holds one weight
    at a time, in float32. `progress` gets the number of weights that are done. As `save_model`
    writes, all or nothing. Returns the folder. Raises RequestError for an unknown preset, and
    CheckpointError for weights that are damaged, or too large for the format.
    """
    if preset not in GGUF_PRESETS:
        raise RequestError(
            f"{preset!r} is no GGUF format written here; known: {', '.join(GGUF_PRESETS)}"
        )
    shapes, family = expected_shapes(checkpoint.config), checkpoint.config.family
    checkpoint.check(shapes)
    sources = stored_weights(checkpoint, shapes, read_loras(lora, lora_strength, shapes, family))
    weights = [
        _Weight(to_published(name, family), sources[name], shape, _format(name, shape, preset))
        for name, shape in shapes.items()
    ]
    entry = quantised_entry(preset, checkpoint.fingerprint())
    document = with_quantised(write_config(checkpoint.config), entry)
    target = Path(folder).resolve()
    with (
        new_checkpoint(target, document, tokenizer, extra_files, overwrite=overwrite) as aside,
        (aside / f"model-{preset.upper()}.gguf").open("wb") as file,
    ):
        _write(file, weights, progress)
    return target


@dataclass(frozen=True)
class _Weight:
    """A tensor to write: where it comes from, and its format."""

    name: str
    source: StoredWeight
    shape: torch.Size
    format: BlockFormat | torch.dtype

    @property
    def number(self) -> int:
        """Its type in the file."""
        if isinstance(self.format, BlockFormat):
            return self.format.number
        return F16 if self.format == torch.float16 else F32

    @property
    def nbytes(self) -> int:
        if isinstance(self.format, BlockFormat):
            return self.shape.numel() // self.format.elements * self.format.nbytes
        return self.shape.numel() * self.format.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """Its bytes, in pieces of about two million values. Raises CheckpointError."""
        values = self.source.read(torch.float32, torch.device("cpu")).flatten()
        for piece in values.split(CHUNK_ELEMENTS):
            try:
                yield self._encoded(piece).flatten().view(torch.uint8)
            except ValueError as error:
                raise CheckpointError(f"{self.name} cannot be written: {error}") from error

    def _encoded(self, values: Tensor) -> Tensor:
        if isinstance(self.format, BlockFormat):
            assert self.format.encode is not None
            return self.format.encode(values.view(-1, self.format.elements))
        stored = values.to(self.format)
        if not all_finite(stored):
            raise ValueError(f"{float(values.abs().max()):.3g} does not fit float16")
        return stored


def block_formats(preset: str, shapes: Mapping[str, torch.Size]) -> set[BlockRows]:
    """The formats of those weights (our names) that `save_gguf` writes in blocks."""
    formats = {_format(name, shape, preset) for name, shape in shapes.items()}
    return {BlockRows(format) for format in formats if isinstance(format, BlockFormat)}


def _format(name: str, shape: torch.Size, preset: str) -> BlockFormat | torch.dtype:
    """The format of a tensor (our name)."""
    part, matrix = part_of(name), len(shape) == 2
    if matrix and part in QUANTISED_PARTS and preset != "f16":
        format = BLOCK_FORMATS[preset.upper()]
        return torch.float16 if shape[1] % format.elements else format
    halved = matrix and part in (*HALF_PARTS, *QUANTISED_PARTS)
    return torch.float16 if halved else torch.float32


def _write(file: BinaryIO, weights: Sequence[_Weight], progress: Callable[[int], None]) -> None:
    pairs = (
        _text("general.architecture") + struct.pack("<I", STRING) + _text(ARCHITECTURE),
        _text(ALIGNMENT) + struct.pack("<II", U32, DEFAULT_ALIGNMENT),
        _text("general.quantization_version") + struct.pack("<II", U32, 2),
    )
    file.write(GGUF_START + struct.pack("<IQQ", VERSION, len(weights), len(pairs)))
    file.writelines(pairs)
    offset = 0
    for weight in weights:
        sizes = weight.shape[::-1]
        file.write(_text(weight.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        file.write(struct.pack("<IQ", weight.number, offset))
        offset += _padded(weight.nbytes)
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for number, weight in enumerate(weights, start=1):
        for piece in weight.pieces():
            file.write(piece.numpy().data)
        file.write(bytes(_padded(weight.nbytes) - weight.nbytes))
        progress(number)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
