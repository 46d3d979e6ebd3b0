"""ExecutionPlan: limits of memory and of work per step, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from neounify.config import ModelConfig
from neounify.config.checks import require

if TYPE_CHECKING:
    import torch

PREFIX_BYTES = 2**31
"""Memory of prefixes copied side by side for the images of one call; up to twice as much for very
unequal images."""
LOGITS = 2**26
"""Logits in memory at a time in training."""


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """Limits of one model on one device, measured on two CPU cores (docs/log.md).

    Rows are tokens of a packed call of the model. Thresholds between ways to attend stand with
    those ways (`neounify.attention`). Raises ConfigError for limits below 1.
    """

    device: str = "cpu"
    """Device of the model, as "cpu" or "cuda:0"."""
    attention: str = "auto"
    """Name of the attention backend (`neounify.attention.BACKENDS`), "auto" for the best one."""
    kv_blocks: int = 2048
    """Blocks of the paged KV cache, which all requests of a server share."""
    kv_block_size: int = 16
    """Tokens of a block."""
    prefill_rows: int = 32_768
    """Prompt tokens of one call; a longer list of prompts takes several calls."""
    prefill_step_rows: int = 512
    """Prompt tokens of a server's step, for which the text being generated waits."""
    denoise_rows: int = 32_768
    """Image tokens of one call, over all guidance branches; more take several calls a step."""
    denoise_step_rows: int = 1024
    """Image tokens of a server's denoising step, over all guidance branches."""
    prefix_rows: int = 32_768
    """Tokens of prefixes copied side by side for the images of one call."""
    logits_rows: int = 512
    """Text tokens whose logits are in memory at a time in training; those of the others are
    computed again in the backward pass."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name not in ("device", "attention"):
                require(value >= 1, f"{field.name} must be at least 1, got {value}")


def plan_execution(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    free_bytes: int | None = None,
) -> ExecutionPlan:
    """The plan of a model of this config in `dtype` on a device.

    `free_bytes` is the device's memory that copies of prefixes may take half of, None for no
    bound but PREFIX_BYTES. All devices have the limits of CPUs so far.
    """
    defaults = ExecutionPlan()
    prefix_bytes = PREFIX_BYTES if free_bytes is None else min(PREFIX_BYTES, free_bytes // 2)
    prefix_rows = prefix_bytes // config.kv_bytes(dtype.itemsize)
    return ExecutionPlan(
        device=str(device),
        prefix_rows=max(1, min(defaults.denoise_rows, prefix_rows)),
        logits_rows=max(1, LOGITS // config.vocab_size),
    )
