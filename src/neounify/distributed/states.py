"""Tensors cut over ranks as files: safetensors by name, one per rank, read by slices (DCP)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from neounify.distributed.ranks import ONE, Ranks
from neounify.distributed.shards import place
from neounify.errors import CheckpointError


def files_of(rank: int) -> str:
    """The pattern of the files that a rank writes."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def save_sharded(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Write what each rank holds of some tensors into a folder; collective.

    Raises CheckpointError on all ranks where one could not write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:
        raise CheckpointError(_explained(error)) from error


def load_sharded(folder: Path, like: Mapping[str, Tensor], ranks: Ranks = ONE) -> dict[str, Tensor]:
    """The tensors of a folder by name: cut as those of `like`, else whole; collective.

    Each rank reads the slices that it holds. Raises the errors of `Ranks.together`, also for pieces
    that are missing and shapes that differ from those of `like`.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = ranks.together(lambda: _without_values(reader, folder, like))

    def read() -> None:
        try:
            with warnings.catch_warnings():
                # One process, which is meant, is warned of.
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                dcp.load(tensors, storage_reader=reader, process_group=ranks.group)
        except CheckpointException as error:
            raise CheckpointError(_explained(error)) from error

    ranks.together(read)
    return tensors


def _without_values(
    reader: dcp.HuggingFaceStorageReader, folder: Path, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors for what is in a folder, by the headers of its files."""
    tensors: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        _check_pieces(folder, name, stored)
        if name not in like:
            tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
            continue
        if like[name].shape != stored.size:
            raise CheckpointError(
                f"it is of another model: {name} has shape {list(stored.size)}, here "
                f"{list(like[name].shape)}"
            )
        tensors[name] = torch.empty_like(like[name])
    return tensors


def _check_pieces(folder: Path, name: str, stored: TensorStorageMetadata) -> None:
    size = sum(chunk.sizes.numel() for chunk in stored.chunks)
    if size != stored.size.numel():
        raise CheckpointError(f"{folder} lacks pieces of {name}")


class _Piece(NamedTuple):
    """A part of a tensor: its file, where it begins along each dimension, and its shape."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class StoredTensors:
    """Tensors of one file, or of a folder that ranks wrote, read one by one and by slices.

    Raises CheckpointError for pieces that are missing, and what safetensors raises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, torch.Size] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._open: dict[str, Any] = {}
        if path.is_dir():
            self._find_pieces()
            return
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no mapping
                shape = tuple(stored.get_slice(name).get_shape())
                self.shapes[name] = torch.Size(shape)
                self._pieces[name] = [_Piece(str(path), (0,) * len(shape), shape)]

    def _find_pieces(self) -> None:
        metadata = dcp.HuggingFaceStorageReader(str(self.path)).read_metadata()
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            _check_pieces(self.path, name, stored)
            self.shapes[name] = stored.size
        for index, piece in metadata.storage_data.items():
            offset = tuple(index.offset or ())
            self._pieces.setdefault(index.fqn, []).append(
                _Piece(piece.relative_path, offset, tuple(piece.shape))
            )

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or the part of it at some slices of every dimension; no other part is read."""
        wanted = where or tuple(slice(0, size) for size in self.shapes[name])
        pieces = self._pieces[name]
        if not wanted or len(pieces) == 1:
            return self._part(name, pieces[0], wanted)
        parts: list[tuple[tuple[slice, ...], Tensor]] = []
        for piece in pieces:
            ends = zip(wanted, piece.offset, piece.shape, strict=True)
            common = [(max(w.start, o), min(w.stop, o + size)) for w, o, size in ends]
            if all(start < stop for start, stop in common):
                place = tuple(
                    slice(start - w.start, stop - w.start)
                    for (start, stop), w in zip(common, wanted, strict=True)
                )
                inside = tuple(
                    slice(start - o, stop - o)
                    for (start, stop), o in zip(common, piece.offset, strict=True)
                )
                parts.append((place, self._part(name, piece, inside)))
        shape = [w.stop - w.start for w in wanted]
        if len(parts) == 1:
            return parts[0][1]
        tensor = torch.empty(shape, dtype=self._part(name, pieces[0], _nothing(shape)).dtype)
        for place, part in parts:
            tensor[place] = part
        return tensor

    def _part(self, name: str, piece: _Piece, inside: tuple[slice, ...]) -> Tensor:
        if piece.file not in self._open:
            self._open[piece.file] = safe_open(piece.file, "pt")
        stored = self._open[piece.file]
        part: Tensor = stored.get_slice(name)[inside] if inside else stored.get_tensor(name)
        return part


def _nothing(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, 0) for _ in shape)


def read_like(stored: StoredTensors, name: str, like: Tensor | None) -> Tensor:
    """A stored tensor cut over the ranks as another is, of which each reads what it holds; else
    whole."""
    if not isinstance(like, DTensor) or stored.shapes[name] != like.shape:
        return stored.read(name)
    return DTensor.from_local(
        stored.read(name, place(like)).to(like.device, copy=True).contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _explained(error: CheckpointException) -> str:
    """What failed on which rank, in one line."""
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in failures)
