"""Tensors cut over ranks as files: safetensors by name, one per rank, read by slices (DCP)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from neounify.distributed.ranks import ONE, Ranks
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
        size = sum(chunk.sizes.numel() for chunk in stored.chunks)
        if size != stored.size.numel():
            raise CheckpointError(f"{folder} lacks pieces of {name}")
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


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, cut over the ranks as another is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    device = tensor.to(like.device)
    return distribute_tensor(device, like.device_mesh, like.placements, src_data_rank=None)


def _explained(error: CheckpointException) -> str:
    """What failed on which rank, in one line."""
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in failures)
