"""Quantising of checkpoints, weight by weight: files are laid out first, then filled in place.

With the preset `STORED` weights keep the formats they have. LoRA files are then merged by decoding,
adding and quantising again, of the weights they change; all other codes are copied.

Memory holds some rows of a weight in float32, of 4 bits all of them. In a file, codes lie at
multiples of 64 bytes, so that they can be computed with where they are mapped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from neounify.checkpoint.config_json import (
    quantised_as,
    quantised_entry,
    with_quantised,
    write_config,
)
from neounify.checkpoint.load import expected_shapes, stored_weights
from neounify.checkpoint.lora_file import LoraSpec, read_loras
from neounify.checkpoint.mapped import DTYPE_NAMES
from neounify.checkpoint.names import to_published
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import StoredWeight
from neounify.checkpoint.save import (
    DESCRIPTION,
    INDEX_FILE,
    SINGLE_FILE,
    SavesFiles,
    new_checkpoint,
)
from neounify.errors import RequestError
from neounify.files import write_json
from neounify.quant.blocks import BlockRows
from neounify.quant.formats import (
    CODES,
    RELATIVE,
    FourBits,
    Fp8Rows,
    PublishedFormat,
    Shape,
)
from neounify.quant.presets import preset_formats
from neounify.quant.stored import StoredCodes, description_tensor

STORED = "stored"
"""The preset of a checkpoint that is quantised already: each weight in its own format."""
ALIGNMENT = 64
PLAIN_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of weights in 8 bits without a scale; with updates they need scales."""
CPU = torch.device("cpu")
Layout = dict[str, tuple[Shape, torch.dtype]]


def quantise_checkpoint(
    checkpoint: CheckpointFolder,
    folder: str | os.PathLike[str],
    preset: str,
    *,
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    tokenizer: SavesFiles | None = None,
    extra_files: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write config.json, weights in the formats of `preset`, the tokenizer's and `extra_files`.

    Weights that the preset leaves out are written as they are stored, codes of other formats as
    what they mean, in float32. LoRA files are merged first. `progress` gets the number of weights
    that are done. As `save_model` writes, all or nothing; returns the folder. Raises RequestError
    for an unknown preset, a model that is quantised already and, with `STORED`, one that is not or
    is a GGUF file, and CheckpointError for weights that are damaged.
    """
    if max_shard_bytes < 1:
        raise RequestError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    parts = _parts(checkpoint, preset, lora, lora_strength)
    target = Path(folder).resolve()
    before = quantised_as(checkpoint.config) if preset == STORED else None
    entry = quantised_entry(before or preset, checkpoint.fingerprint())
    document = with_quantised(write_config(checkpoint.config), entry)
    with new_checkpoint(target, document, tokenizer, extra_files, overwrite=overwrite) as aside:
        write_parts(aside, shards_of(parts, max_shard_bytes), progress)
    return target


class Part(Protocol):
    """Some tensors of a file, written together."""

    @property
    def layout(self) -> Layout:
        """Shape and dtype of each."""

    @property
    def nbytes(self) -> int: ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, in memory only while they are written."""


@dataclass(frozen=True)
class _Part:
    """A weight to write (published name), and its format; None as it is stored."""

    name: str
    source: StoredWeight
    format: PublishedFormat | None

    @property
    def copied(self) -> StoredCodes | None:
        """The codes of a weight that has its format already, and no updates."""
        codes = self.source.codes
        return (
            None if codes is None or self.source.updates or codes.format != self.format else codes
        )

    @property
    def layout(self) -> Layout:
        """The tensors it becomes in the file."""
        info, module = self.source.info, self.name.removesuffix(CODES)
        if self.format is None:
            dtype = torch.float32 if self.source.codes else info.dtype
            return {self.name: (tuple(self.source.shape), dtype)}
        sizes = self.format.layout(tuple(self.source.shape))
        if self.copied is not None:
            sizes[CODES] = info.stored_shape, info.dtype
        tensors = {f"{module}{part}": size for part, size in sizes.items()}
        described = description_tensor(self.format)
        return tensors | {self.description: (tuple(described.shape), torch.uint8)}

    @property
    def description(self) -> str:
        return self.name.removesuffix(f".{CODES}") + DESCRIPTION

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(*size) for size in self.layout.values())

    def tensors(self) -> dict[str, Tensor]:
        """What is written. Raises CheckpointError for values that are not finite."""
        if self.format is None:
            ((name, (_, dtype)),) = self.layout.items()
            return {name: self.source.read(dtype, CPU)}
        module = self.name.removesuffix(CODES)
        if self.copied is not None:
            # Copied before they are checked, which drops the pages of the file behind it.
            codes = {CODES: self.source.view().clone()} | dict(self.copied.beside)
            self.source.verify()
            if RELATIVE in codes:
                replace(self.source, name=self.source.name.removesuffix(CODES) + RELATIVE).verify()
        else:
            codes = replace(self.source, format=self.format).read_codes(CPU)
        tensors = {f"{module}{part}": tensor for part, tensor in codes.items()}
        return tensors | {self.description: description_tensor(self.format)}


def check_plain(checkpoint: CheckpointFolder, names: Collection[str]) -> None:
    """Raise RequestError where weights (our names) are codes already."""
    family = checkpoint.config.family
    done = [name for name in names if to_published(name, family) in checkpoint.quantised]
    if done:
        raise RequestError(
            f"{checkpoint.path.name} is quantised already, {len(done)} of {len(names)} weights: "
            "quantise the checkpoint it was made of, which loses less"
        )


def _parts(
    checkpoint: CheckpointFolder,
    preset: str,
    lora: LoraSpec | Sequence[LoraSpec] | None,
    lora_strength: float,
) -> list[_Part]:
    shapes = expected_shapes(checkpoint.config)
    checkpoint.check(shapes)
    family = checkpoint.config.family
    updates = read_loras(lora, lora_strength, shapes, family)
    sources = stored_weights(checkpoint, shapes, updates)
    if preset == STORED:
        formats = _stored_formats(checkpoint, sources)
    else:
        sizes = {name: tuple(shape) for name, shape in shapes.items()}
        layers, tied = checkpoint.config.num_layers, checkpoint.config.tie_embeddings
        formats = preset_formats(preset, sizes, layers, tied=tied)
        check_plain(checkpoint, formats)
    return [_Part(to_published(n, family), s, formats.get(n)) for n, s in sources.items()]


def _stored_formats(
    checkpoint: CheckpointFolder, sources: Mapping[str, StoredWeight]
) -> dict[str, PublishedFormat]:
    """The formats that weights have (our names). Raises RequestError."""
    formats: dict[str, PublishedFormat] = {}
    for name, source in sources.items():
        format = None if source.codes is None else source.codes.format
        if isinstance(format, BlockRows) or source.info.blocks is not None:
            raise RequestError(
                f"{checkpoint.path.name} is a GGUF file, whose formats {STORED!r} does not write: "
                f"name one, such as q8_0"
            )
        if isinstance(format, FourBits) and source.updates:
            format = replace(format, codebook=True)  # levels are fitted
        if format is None and source.updates and source.info.dtype in PLAIN_FP8:
            format = Fp8Rows()
        if isinstance(format, PublishedFormat):
            formats[name] = format
    if not formats:
        raise RequestError(
            f"{checkpoint.path.name} holds no quantised weights that {STORED!r} could keep: name "
            f"a format"
        )
    return formats


# --- files ---


@dataclass
class _Shard:
    parts: list[Part] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def layout(self) -> Layout:
        return {name: size for part in self.parts for name, size in part.layout.items()}


def shards_of(parts: Sequence[Part], max_bytes: int) -> list[_Shard]:
    """Parts dealt to files of at most so many bytes, a larger part alone in one."""
    shards = [_Shard()]
    size = 0
    for part in parts:
        if shards[-1].parts and size + part.nbytes > max_bytes:
            shards.append(_Shard())
            size = 0
        shards[-1].parts.append(part)
        size += part.nbytes
    return shards


def write_parts(folder: Path, shards: list[_Shard], progress: Callable[[int], None]) -> None:
    """Write files, and their index where there are several; `progress` counts parts."""
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            name = SINGLE_FILE
        with (folder / name).open("wb") as file:
            for _ in _fill(file, shard):
                done += 1
                progress(done)
        weight_map.update(dict.fromkeys(shard.layout, name))
    if len(shards) > 1:
        total = sum(shard.nbytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)


def _fill(file: BinaryIO, shard: _Shard) -> Iterator[None]:
    """Write the header of a shard, then its weights one by one, each to its place."""
    header, offsets = _header(shard.layout)
    file.write(len(header).to_bytes(8, "little") + header)
    start = file.tell()
    for part in shard.parts:
        for name, tensor in part.tensors().items():
            file.seek(start + offsets[name])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        yield


def _header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where each tensor begins behind it.

    What fills whole multiples of 64 bytes comes first, so that everything is aligned.
    """

    def place(name: str) -> tuple[bool, int, str]:
        shape, dtype = layout[name]
        return _nbytes(shape, dtype) % ALIGNMENT != 0, -dtype.itemsize, name

    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for name in sorted(layout, key=place):
        shape, dtype = layout[name]
        offsets[name] = offset
        stop = offset + _nbytes(shape, dtype)
        code = DTYPE_NAMES[dtype]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % ALIGNMENT), offsets


def _nbytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
