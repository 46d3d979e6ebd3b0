"""Sizes of a checkpoint for a memory plan, from its headers."""

from __future__ import annotations

import torch

from neounify.checkpoint.names import from_published, stream_of
from neounify.checkpoint.reader import CheckpointFolder
from neounify.runtime.memory_plan import STREAMS, StreamName, weight_bytes
from neounify.runtime.memory_rows import Kept

DTYPE_LABELS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def kept_weights(checkpoint: CheckpointFolder, dtype: torch.dtype) -> Kept:
    """Weights of a checkpoint loaded in `dtype`, and what its files hold of each stream."""
    return Kept(
        name=DTYPE_LABELS[dtype],
        weights=weight_bytes(checkpoint.config, dtype.itemsize),
        itemsize=dtype.itemsize,
        stored=stored_bytes(checkpoint),
    )


def stored_bytes(checkpoint: CheckpointFolder) -> dict[StreamName, float]:
    """Bytes that the files hold of each stream, without embedding and text head."""
    return {name: sum(sizes.values()) for name, sizes in _by_dtype(checkpoint).items()}


def wider_streams(
    checkpoint: CheckpointFolder, dtype: torch.dtype
) -> dict[StreamName, tuple[str, float]]:
    """Streams that files hold mostly in a wider dtype than `dtype`: its name, bytes of all."""
    wider = {}
    for stream, sizes in _by_dtype(checkpoint).items():
        most = max(sizes, key=lambda stored: sizes[stored], default=dtype)
        if most.itemsize > dtype.itemsize:
            wider[stream] = (str(most).removeprefix("torch."), sum(sizes.values()))
    return wider


def _by_dtype(checkpoint: CheckpointFolder) -> dict[StreamName, dict[torch.dtype, float]]:
    sums: dict[StreamName, dict[torch.dtype, float]] = {name: {} for name in STREAMS}
    for published, info in checkpoint.tensors.items():
        name = from_published(published)
        stream = "shared" if name is None else stream_of(name)
        if stream != "shared":
            sizes = sums[stream]
            sizes[info.dtype] = sizes.get(info.dtype, 0.0) + info.nbytes
    return sums
