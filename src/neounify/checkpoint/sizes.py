"""Sizes of a checkpoint for a memory plan, from its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch

from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.names import from_published, layer_of, stream_of, to_published
from neounify.checkpoint.reader import CheckpointFolder
from neounify.quant.presets import preset_formats
from neounify.runtime.memory_plan import STREAMS, StreamName, WeightBytes, weight_bytes
from neounify.runtime.memory_rows import Kept

EMBEDDING, TEXT_HEAD = "embed_tokens.weight", "lm_head.weight"
MAKING = 0.06e9
"""Bytes that quantising takes beside its results, and leaves; measured, see docs/memory.md."""
ADAPTER_BYTES = 4
"""Of a number of an adapter beside codes, float32."""
DTYPE_LABELS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def kept_weights(
    checkpoint: CheckpointFolder,
    dtype: torch.dtype,
    *,
    decoded: bool = False,
    quantise: str | None = None,
    updates: Mapping[str, int] | None = None,
    shapes: Mapping[str, torch.Size] | None = None,
) -> Kept:
    """Weights of a checkpoint loaded in `dtype`, and what its files hold of each stream.

    Codes of quantised weights stay as they are, unless they are `decoded`; others become codes with
    the preset `quantise`. `updates` by LoRA files (see `numbers_of`) stay beside codes. `shapes`
    (by our names) are those of the model, where the checkpoint has been checked against them.

    Raises CheckpointError for weights that do not fit the config.
    """
    if shapes is None:
        shapes = expected_shapes(checkpoint.config)
        checkpoint.check(shapes)
    updates = updates or {}
    weights, stored = weight_bytes(checkpoint.config, dtype.itemsize), stored_bytes(checkpoint)
    label = DTYPE_LABELS[dtype]
    saved = {} if decoded else _saved(checkpoint, shapes, dtype.itemsize, quantise, updates)
    if saved:
        weights, label = _without(weights, saved), quantise or "codes"
        beside = sum(updates.get(name, 0) for name in saved.keys() - {EMBEDDING})
        making = MAKING if quantise else 0
        weights = replace(weights, adapters=ADAPTER_BYTES * beside, making=making)
    head = checkpoint.tensors.get(to_published(TEXT_HEAD, checkpoint.config.family))
    as_stored = head is not None and head.dtype == dtype
    mapped = as_stored and TEXT_HEAD not in saved and TEXT_HEAD not in updates
    weights = replace(weights, head_mapped=mapped)
    kept = Kept(name=label, weights=weights, itemsize=dtype.itemsize, stored=stored)
    merged = {place[1] for name in updates.keys() - saved.keys() if (place := layer_of(name))}
    staged = {
        name: kept.share(name) * weights.largest(name)
        for name in STREAMS
        if name in merged or not 0.99 < kept.share(name) < 1.01
    }
    return replace(kept, weights=replace(weights, staged=staged))


def _saved(
    checkpoint: CheckpointFolder,
    shapes: Mapping[str, torch.Size],
    itemsize: int,
    quantise: str | None,
    updates: Mapping[str, int],
) -> dict[str, float]:
    """Bytes by which codes, with what belongs to them, are less than plain weights (our names)."""
    saved: dict[str, float] = {}
    for published, codes in checkpoint.quantised.items():
        info = checkpoint.tensors[published]
        size = info.nbytes + codes.bytes_beside
        saved[from_published(published) or ""] = prod(codes.shape) * itemsize - size
    # An embedding is decoded where it is tied, and where a LoRA updates its stored codes.
    plain = checkpoint.config.tie_embeddings or (EMBEDDING in saved and EMBEDDING in updates)
    if quantise is not None:
        formats = preset_formats(
            quantise,
            shapes,
            checkpoint.config.num_layers,
            tied=checkpoint.config.tie_embeddings,
        )
        for name in formats.keys() - saved.keys():
            layout = formats[name].layout(shapes[name]).values()
            size = sum(prod(shape) * dtype.itemsize for shape, dtype in layout)
            saved[name] = prod(shapes[name]) * itemsize - size
    if plain:
        saved.pop(EMBEDDING, None)
    return saved


def _without(weights: WeightBytes, saved: Mapping[str, float]) -> WeightBytes:
    layers = {name: list(sizes) for name, sizes in weights.layers.items()}
    for name, size in saved.items():
        place = layer_of(name)
        if place is not None:
            layers[place[1]][place[0]] -= size
    return replace(
        weights,
        layers=layers,
        embedding=weights.embedding - saved.get(EMBEDDING, 0),
        lm_head=weights.lm_head - saved.get(TEXT_HEAD, 0),
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
