"""Sizes of a checkpoint for a memory plan, from its headers."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from neounify.checkpoint.names import from_published, layer_of, stream_of
from neounify.checkpoint.reader import CheckpointFolder
from neounify.runtime.memory_plan import STREAMS, StreamName, WeightBytes, weight_bytes
from neounify.runtime.memory_rows import Kept

DTYPE_LABELS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def kept_weights(
    checkpoint: CheckpointFolder, dtype: torch.dtype, *, decoded: bool = False
) -> Kept:
    """Weights of a checkpoint loaded in `dtype`, and what its files hold of each stream.

    Codes of quantised layers stay as they are, unless they are `decoded`.
    """
    weights, stored = weight_bytes(checkpoint.config, dtype.itemsize), stored_bytes(checkpoint)
    label = DTYPE_LABELS[dtype]
    if checkpoint.quantised and not decoded:
        weights, label = _with_codes(checkpoint, weights, dtype.itemsize), "codes"
    shares = {name: stored[name] / (weights.stream(name) + weights.rest[name]) for name in STREAMS}
    staged = {
        name: share * weights.largest(name)
        for name, share in shares.items()
        if not 0.99 < share < 1.01
    }
    return Kept(
        name=label,
        weights=replace(weights, staged=staged),
        itemsize=dtype.itemsize,
        stored=stored,
    )


def _with_codes(checkpoint: CheckpointFolder, weights: WeightBytes, itemsize: int) -> WeightBytes:
    """The sizes of layers whose matrices stay codes, with what belongs to them."""
    layers = {name: list(sizes) for name, sizes in weights.layers.items()}
    for published, codes in checkpoint.quantised.items():
        place = layer_of(from_published(published) or "")
        if place is not None:
            info = checkpoint.tensors[published]
            saved = prod(codes.shape) * itemsize - info.nbytes - codes.bytes_beside
            layers[place[1]][place[0]] -= saved
    return replace(weights, layers=layers)


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
