"""The dtype that a checkpoint is loaded in, and whether a device computes in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch

from neounify.checkpoint.names import from_published
from neounify.checkpoint.reader import CheckpointFolder
from neounify.errors import RequestError
from neounify.runtime.devices import abilities
from neounify.runtime.process import memory_bytes

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MAX_MEMORY_SHARE = 0.5
"""Share of the machine's memory that weights may take after a conversion to float32."""


class DtypeChoice(NamedTuple):
    """A dtype and the reason for it, in a few words. It is picklable, and chosen only once."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{_name(self.dtype)} ({self.reason})"


Dtype: TypeAlias = str | torch.dtype | DtypeChoice | None
"""A dtype to load in: a name or torch dtype, "stored", an earlier choice, or None for "auto"."""


def choose_dtype(dtype: Dtype, checkpoint: CheckpointFolder, device_type: str) -> DtypeChoice:
    """The dtype to load a checkpoint in, on a device of a type such as "cpu" or "cuda".

    A name, a torch dtype and an earlier choice are taken as they are; "stored" is `stored_dtype`.
    None or "auto" is the stored dtype too, but for half precision on a CPU that multiplies it
    slowly: then it is float32, which is exact, unless the weights would take more than half of the
    memory.
    The choice follows from the machine alone, not from a timing, so it is always the same.
    Raises RequestError for an unknown dtype.
    """
    if isinstance(dtype, DtypeChoice):
        return dtype
    if dtype is not None and dtype not in ("auto", "stored"):
        resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if resolved is None or resolved not in DTYPES.values():
            known = ", ".join(("auto", "stored", *DTYPES))
            raise RequestError(f"dtype {dtype!r} is unknown; known are {known}")
        return DtypeChoice(resolved, "as asked for")
    stored = stored_dtype(checkpoint)
    if dtype == "stored" or device_type != "cpu" or stored.itemsize != 2 or multiplies(stored):
        return DtypeChoice(stored, _as_stored(checkpoint))
    needed, memory = bytes_in(checkpoint, torch.float32), memory_bytes()
    if needed > MAX_MEMORY_SHARE * memory:
        return DtypeChoice(
            stored,
            f"{_as_stored(checkpoint)}: this processor is slow in {_name(stored)}, but float32 "
            f"would take {needed / 1e9:.0f} of {memory / 1e9:.0f} GB of memory",
        )
    return DtypeChoice(torch.float32, f"stored as {_name(stored)}, in which this processor is slow")


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """RequestError for a dtype that a device does not compute in."""
    if dtype == torch.float64 and not abilities(device).float64:
        raise RequestError(
            f"dtype float64: {device.type} does not compute in it; take float32", param="dtype"
        )


def _as_stored(checkpoint: CheckpointFolder) -> str:
    labels = sorted({codes.label for codes in checkpoint.quantised.values()})
    return f"layers stored as {', '.join(labels)}" if labels else "as stored"


def stored_dtype(checkpoint: CheckpointFolder) -> torch.dtype:
    """The dtype that a checkpoint's layers are meant to be computed in.

    bfloat16 as soon as one tensor of a layer is stored in it or in 8 bits: U1.5 checkpoints hold
    the generation stream in float32 beside an understanding stream in bfloat16, and were
    computed in bfloat16. Else float16 if one is, else float32 or float64.
    """
    layers = {
        info.dtype
        for name, info in checkpoint.tensors.items()
        if (from_published(name) or "").startswith("layers.") and not _is_norm(name)
    }
    dtypes = layers or {info.dtype for info in checkpoint.tensors.values()}
    if any(dtype.itemsize == 1 for dtype in dtypes):
        return torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        if dtype in dtypes:
            return dtype
    return torch.bfloat16


def multiplies(dtype: torch.dtype, features: Mapping[str, object] | None = None) -> bool:
    """Whether a CPU has matrix products in this half precision that are faster than float32's.

    `features` are those of `torch.cpu.get_capabilities`, by default this processor's.
    """
    if features is None:
        # Older versions of torch cannot tell; float32 is then slower at worst, never wrong.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)
        features = capabilities()
    has = {name for name, value in features.items() if value is True}
    if dtype == torch.float16:
        return "amx_fp16" in has
    if "avx512_bf16" in has and "amx_bf16" not in has:
        # Intel's processors multiply it at half the rate of float32 without AMX (docs/log.md).
        return not str(features.get("cpu_name", "")).startswith("Intel")
    return bool(has & {"amx_bf16", "bf16", "sve_bf16"})


def bytes_in(checkpoint: CheckpointFolder, dtype: torch.dtype) -> int:
    values = sum(math.prod(checkpoint.shape_of(name)) for name in checkpoint.tensors)
    return values * dtype.itemsize


def _is_norm(published: str) -> bool:
    return "norm" in published


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
