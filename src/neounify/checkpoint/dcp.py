"""Conversion of torch distributed checkpoints (DCP) to the published layout, one tensor at a time.

Their `.metadata` is a pickle, and so is the head of every tensor in `*.distcp`. The first is read
with an unpickler that knows the names in `_KNOWN`, makes inert records of them and refuses all
others; the second by torch's loader of weights alone. What they say is checked against the files.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neounify.checkpoint.config_json import config_of_tensors, write_config
from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.mapped import DTYPE_NAMES
from neounify.checkpoint.names import family_of
from neounify.checkpoint.quantise_files import Layout, shards_of, write_parts
from neounify.checkpoint.reader import (
    DCP_METADATA,
    DCP_SUBFOLDER,
    MAX_CONFIG_BYTES,
    CheckpointFolder,
    files_ending,
    is_dcp,
    read_document,
)
from neounify.checkpoint.save import SavesFiles, new_checkpoint
from neounify.config import ModelConfig
from neounify.config.families import FAMILIES
from neounify.errors import CheckpointError
from neounify.files import read_bytes

ENDING = ".distcp"
MAX_METADATA_BYTES = 64 * 2**20
MAX_SIDES = 64
"""Sides of a tensor in torch."""
MAX_VALUES = 16
"""Arguments that an object of the metadata is made with, at most."""
MAX_TUPLE_VALUES = 10_000
"""Values in a tuple and in the tuples inside it."""


def convert_dcp(
    source: Path,
    config: Path,
    target: str | os.PathLike[str],
    *,
    tokenizer: Callable[[ModelConfig], SavesFiles],
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a distributed checkpoint as a folder of the published layout, weights as stored.

    `source` is the folder with `model/`, or that one; `config` the one with config.json, by which
    `tokenizer` gets the model's. All or nothing, as `save_model` writes. `progress` gets the number
    of tensors that are done, `note` a sentence about a checkpoint that may be unfinished. Raises
    CheckpointError for what is damaged, no such checkpoint, or of another model, and ConfigError.
    """
    parts = read_dcp(source)
    shapes = {part.name: part.shape for part in parts}
    named = family_of(shapes)
    family = FAMILIES[named]
    if not (config / "config.json").is_file():
        raise CheckpointError(
            f"{config} holds no config.json: name the folder with config.json and the tokenizer of "
            f"{family.base or 'its model'}, as --config"
        )
    document = read_document(config / "config.json", MAX_CONFIG_BYTES)
    described = config_of_tensors(document, named, shapes)
    folder = _folder_of(source)
    places = (folder / family.finished_file, folder.parent / family.finished_file)
    if family.finished_file and not any(place.is_file() for place in places):
        note(
            f"{source} lacks {family.finished_file}, which {family.title} checkpoints have once "
            "they are complete: it may be unfinished"
        )
    written = Path(target).resolve()
    with new_checkpoint(
        written, write_config(described), tokenizer(described), None, overwrite=overwrite
    ) as aside:
        write_parts(aside, shards_of(parts, max_shard_bytes), progress)
        opened = CheckpointFolder.open(aside)
        opened.check(expected_shapes(opened.config))
    return written


def read_dcp(source: Path) -> list[StoredTensor]:
    """The tensors of a distributed checkpoint, none of them read yet. Raises CheckpointError."""
    if not is_dcp(source):
        raise CheckpointError(
            f"{source} holds no torch distributed checkpoint: expected "
            f"{DCP_SUBFOLDER}/{DCP_METADATA}"
        )
    folder = _folder_of(source)
    path = folder / DCP_METADATA
    try:
        data = read_bytes(path, MAX_METADATA_BYTES, CheckpointError)
        _check_pickle(data)
        return _tensors(_Unpickler(io.BytesIO(data)).load(), folder)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or of another version: {type(error).__name__} ({error!s:.200})"
        ) from error


def _folder_of(source: Path) -> Path:
    """The folder of the metadata and the tensors."""
    nested = (source / DCP_SUBFOLDER / DCP_METADATA).is_file()
    return (source / DCP_SUBFOLDER if nested else source).resolve()


# --- metadata ---


class _Record:
    """An object of the metadata without behaviour: what it was made with, and its state."""

    state: Any = None

    def __init__(self, *values: Any) -> None:
        if len(values) > MAX_VALUES:
            raise ValueError(f"an object is made with {len(values)} values")
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        if not isinstance(self.state, Mapping) or name not in self.state:
            raise CheckpointError(f"the metadata lacks {name!r}")
        return self.state[name]


class _Tensor(_Record):
    pass


class _Bytes(_Record):
    pass


def _size(values: Any = ()) -> tuple[Any, ...]:
    """A shape. ValueError for more sides than a tensor has: a pickle may repeat a long one."""
    if len(values) > MAX_SIDES:
        raise ValueError(f"a tensor has {len(values)} sides")
    return tuple(values)


_FILES, _META = "torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.metadata"
_KNOWN: Mapping[tuple[str, str], Any] = {
    (_META, "Metadata"): _Record,
    (_META, "TensorStorageMetadata"): _Tensor,
    (_META, "BytesStorageMetadata"): _Bytes,
    (_META, "TensorProperties"): _Record,
    (_META, "ChunkStorageMetadata"): _Record,
    (_META, "MetadataIndex"): _Record,
    (_META, "StorageMeta"): _Record,
    (_META, "_MEM_FORMAT_ENCODING"): _Record,
    (_FILES, "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("torch", "Size"): _size,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "WindowsPath"): _Record,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPE_NAMES},
}
"""What `torch.distributed.checkpoint.save` of torch 2.13 names → what stands for it here."""


def _check_pickle(data: bytes) -> None:
    """Raise ValueError for a pickle that a few bytes make costly.

    Objects numbered beyond their count: the unpickler makes room for all numbers up to the
    greatest. Tuples of tuples that are the same twice, and twice again: a dictionary that has such
    a key walks all of them.
    """
    stack, marks, memo = list[int](), list[int](), dict[int, int]()
    """The number of values inside each object on the stack and in the memo, as far as it is a
    tuple."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(memo) if opcode.name == "MEMOIZE" else int(argument or 0)
            if not 0 <= number < len(data):
                raise ValueError(f"an object is numbered {number}, in {len(data)} bytes")
            memo[number] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _taken(opcode, stack, marks)
            size = 1 + sum(taken) if "TUPLE" in opcode.name or opcode.name == "REDUCE" else 1
            if size > MAX_TUPLE_VALUES:
                raise ValueError(f"a tuple holds more than {MAX_TUPLE_VALUES:,} values")
            stack += [size] * len(opcode.stack_after)


def _taken(opcode: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> list[int]:
    """What an opcode takes from the stack, removed from it, and from the marks its mark."""
    count = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        count = opcode.stack_before.index(pickletools.markobject) + len(stack) - marks.pop()
    if count > len(stack):
        raise ValueError(f"{opcode.name} has nothing to take")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise CheckpointError(
                f"the metadata names {module}.{name}, which no checkpoint needs; it is not read, "
                "since a pickle can run code: do not trust where it came from"
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError("the metadata refers to objects outside it, which is not supported")


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: where it begins in it, its shape, and its bytes in a file."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int


def _tensors(metadata: Any, folder: Path) -> list[StoredTensor]:
    if not isinstance(metadata, _Record):
        raise CheckpointError(f"{folder / DCP_METADATA} describes no checkpoint")
    stored = {}
    for place, info in dict(metadata.field("storage_data")).items():
        start = place.state.get("offset")
        stored[place.field("fqn"), None if start is None else _numbers(start)] = info
    tensors = []
    for name, entry in dict(metadata.field("state_dict_metadata")).items():
        if isinstance(entry, _Tensor):
            tensors.append(_tensor(str(name), entry, stored, folder))
        elif not isinstance(entry, _Bytes):
            raise CheckpointError(f"{name!r} is neither a tensor nor an object")
    if not tensors:
        raise CheckpointError(f"{folder / DCP_METADATA} lists no tensors")
    listed = sum(tensor.nbytes for tensor in tensors)
    available = sum(file.stat().st_size for file in files_ending(folder, ENDING))
    if listed > available:
        raise CheckpointError(
            f"{folder / DCP_METADATA} lists {listed:,} bytes of tensors, the files hold "
            f"{available:,}"
        )
    return sorted(tensors, key=lambda tensor: tensor.name)


def _tensor(name: str, entry: _Tensor, stored: Mapping[Any, _Record], folder: Path) -> StoredTensor:
    shape, properties = _numbers(entry.field("size")), entry.field("properties").state
    dtype = properties[0]
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name}: its dtype {dtype!r:.60} is not one of safetensors")
    chunks = []
    for chunk in entry.field("chunks"):
        start, sizes = _numbers(chunk.field("offsets")), _numbers(chunk.field("sizes"))
        info = stored.get((name, start))
        if info is None:
            raise CheckpointError(f"{name}: no file holds its part at {list(start)}")
        if info.state.get("transform_descriptors"):
            raise CheckpointError(f"{name}: it is stored transformed, which is not supported")
        inside = len(start) == len(sizes) == len(shape) and all(
            a + n <= whole for a, n, whole in zip(start, sizes, shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{name}: a part of {list(sizes)} at {list(start)} is not inside {list(shape)}"
            )
        file = _file(folder, info.field("relative_path"))
        offset, length = _numbers((info.field("offset"), info.field("length")))
        size = file.stat().st_size
        if offset + length > size or math.prod(sizes) * dtype.itemsize > length:
            raise CheckpointError(
                f"{name}: {list(sizes)} values in {length} bytes at {offset} are not in "
                f"{file.name}, which has {size}"
            )
        chunks.append(_Chunk(start, sizes, file, offset, length))
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise CheckpointError(f"{name}: its parts do not make up {list(shape)}")
    return StoredTensor(name, shape, dtype, tuple(chunks))


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise CheckpointError(f"{numbers!r:.80} are not sizes or places")
    return numbers


def _file(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(ENDING):
        raise CheckpointError(f"{folder}: {name!r:.80} is not the name of a *{ENDING} file")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing; download it too")
    return path


# --- tensors ---


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a distributed checkpoint, as `write_parts` takes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...] = field(repr=False)

    @property
    def layout(self) -> Layout:
        """The tensor it becomes in a file."""
        return {self.name: (self.shape, self.dtype)}

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensors(self) -> dict[str, Tensor]:
        """Its values by its name. Raises CheckpointError."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        filled = torch.zeros(self.shape, dtype=torch.bool) if len(self.chunks) > 1 else None
        for chunk, values in self._values():
            place = tuple(slice(a, a + n) for a, n in zip(chunk.start, chunk.shape, strict=True))
            whole[place] = values
            if filled is not None:
                filled[place] = True
        if filled is not None and not filled.all():
            raise CheckpointError(f"{self.name}: its parts overlap and leave values out")
        if whole.is_floating_point() and not torch.isfinite(whole).all():
            raise CheckpointError(f"{self.name!r} holds NaN or infinite values")
        return {self.name: whole}

    def _values(self) -> Iterator[tuple[_Chunk, Tensor]]:
        for chunk in self.chunks:
            with chunk.file.open("rb") as file:
                file.seek(chunk.offset)
                data = io.BytesIO(file.read(chunk.length))
            try:
                _check_archive(data)
                values = torch.load(data, map_location="cpu", weights_only=True)
            except Exception as error:
                raise CheckpointError(
                    f"{self.name}: its values in {chunk.file.name} cannot be read: {error!s:.200}"
                ) from error
            fits = isinstance(values, Tensor) and values.dtype == self.dtype
            if not fits or tuple(values.shape) != chunk.shape:
                raise CheckpointError(
                    f"{self.name}: {chunk.file.name} does not hold the {list(chunk.shape)} values "
                    f"of {self.dtype} that the metadata lists"
                )
            yield chunk, values


def _check_archive(data: io.BytesIO) -> None:
    """Raise ValueError unless the archive of a tensor is as large as it says: not compressed."""
    with zipfile.ZipFile(data) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its archive is compressed, which torch never writes")
    data.seek(0)
