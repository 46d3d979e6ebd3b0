"""Stored weights: the mapped tensor of one parameter, and the LoRA updates on top."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neounify.checkpoint.lora import LoraUpdate
from neounify.checkpoint.mapped import MappedFile, TensorInfo, all_finite
from neounify.errors import CheckpointError

CHUNK_ELEMENTS = 2**21
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class StoredWeight:
    """A stored tensor (published name) of a file, to which `updates` are added when it is read."""

    file: MappedFile
    name: str
    updates: tuple[LoraUpdate, ...] = ()

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.name]

    def is_view(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the values can be used where they are mapped, without a copy."""
        return (
            not self.updates
            and device.type == "cpu"
            and self.info.dtype == dtype
            and self.file.is_view(self.name)
        )

    def view(self) -> Tensor:
        """The stored tensor without updates, mapped where the file aligns it."""
        return self.file.tensor(self.name)

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor with the values, updates added, in one dtype on one device.

        Works in pieces and drops the file's pages behind it, so that little more than the
        result is resident. Raises CheckpointError for values that are not finite.
        """
        result = torch.empty(self.info.shape, dtype=dtype, device=device)
        updates = [update.to(device) for update in self.updates]
        for start, stored in self._pieces():
            piece = torch.atleast_1d(result)[start : start + stored.shape[0]]
            if updates:
                rows = stored.to(device, torch.float32, copy=True)
                for update in updates:
                    update.add_to(rows, start)
                piece.copy_(rows)
            else:
                piece.copy_(stored)
            if not all_finite(piece):
                raise self._not_finite(stored, dtype)
        return result

    def verify(self) -> None:
        """Read every value once; CheckpointError when one is NaN or infinite."""
        for _, stored in self._pieces():
            if not all_finite(stored):
                raise self._not_finite(stored, stored.dtype)

    def verify_sample(self) -> None:
        """`verify` for the first 4 KiB only: one page, where a ruined tensor shows already."""
        dtype = self.info.dtype
        sample = self.file.head(self.name, SAMPLE_BYTES)
        stored = torch.frombuffer(bytearray(sample), dtype=dtype) if sample else torch.empty(0)
        if not all_finite(stored):
            raise self._not_finite(stored, dtype)

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of about two million elements each; a piece's pages go with it."""
        stored = torch.atleast_1d(self.view())
        row_elements = max(1, math.prod(stored.shape[1:]))
        row_bytes = row_elements * stored.element_size()
        step = max(1, CHUNK_ELEMENTS // row_elements)
        for start in range(0, stored.shape[0], step):
            yield start, stored[start : start + step]
            # From the tensor's start: a page that two pieces share goes with the second.
            self.file.release(self.name, 0, (start + step) * row_bytes)

    def _not_finite(self, stored: Tensor, dtype: torch.dtype) -> CheckpointError:
        where = f"{self.file.path}: tensor {self.name!r}"
        if not all_finite(stored):
            return CheckpointError(f"{where} holds NaN or infinite values; the weights are damaged")
        return CheckpointError(
            f"{where} does not fit in {dtype}: values overflow; load it in a wider dtype"
        )
