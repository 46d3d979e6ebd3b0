"""ExecutionPlan: limits of memory and of work per step, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from neounify.config import ModelConfig
from neounify.config.model import require
from neounify.runtime.devices import abilities
from neounify.runtime.process import available_bytes

if TYPE_CHECKING:
    import torch

PREFIX_BYTES = 2**31
"""Memory of prefixes copied side by side for the images of one call; up to twice as much for very
unequal images."""
PREFILL_ROWS, MIN_ROWS = 32_768, 512
"""Rows of one call of prefill or denoising at most, and the least that they are cut to."""
APART_TOKENS = 8192
"""Tokens of an image from which a call is bound by arithmetic even where the layers are streamed
for it, so that calls of single branches take no longer than one of all (docs/memory.md)."""
UNLIMITED = 2**62
LOGITS = 2**26
"""Logits in memory at a time in training."""


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """Limits of one model on one device, measured on two CPU cores (docs/log.md).

    Rows are tokens of a packed call of the model. Thresholds between ways to attend stand with
    those ways (`neounify.attention`). Raises ConfigError for numbers below 1 and
    seconds below 0.
    """

    device: str = "cpu"
    """Device of the model, as "cpu" or "cuda:0"."""
    attention: str = "auto"
    """Name of the attention backend (`neounify.attention.BACKENDS`), "auto" for the best one."""
    kv_blocks: int = 2048
    """Blocks of the paged KV cache, which all requests of a server share."""
    kv_block_size: int = 16
    """Tokens of a block."""
    kv_headroom: int = 64
    """Free tokens of the paged cache that a sequence needs to enter if it will decode, so that it
    is not preempted at once."""
    max_passed: int = 32
    """Younger sequences that enter the paged cache before one that waits for space."""
    kv_reserve: int = 64
    """Tokens a contiguous cache has room for beyond its prompt; it grows when more are decoded."""
    prefill_rows: int = PREFILL_ROWS
    """Prompt tokens of one call; a longer list of prompts takes several calls."""
    prefill_step_rows: int = 512
    """Prompt tokens of a server's step, for which the text being generated waits."""
    constraint_seconds: float = 0.002
    """Time a step waits for a grammar that is being compiled, while no text is decoded."""
    denoise_rows: int = PREFILL_ROWS
    """Image tokens of one call, over all guidance branches; more take several calls a step."""
    branch_rows: int = UNLIMITED
    """Image tokens of one call, over the guidance branches of a large image; see
    `branches_apart`."""
    denoise_step_rows: int = 1024
    """Image tokens of a server's denoising step, over all guidance branches."""
    prefix_rows: int = 32_768
    """Tokens of prefixes copied side by side for the images of one call."""
    max_missed: int = 4
    """An image that so many denoising steps in a row had no place for goes first."""
    slice_seconds: float = 0.05
    """A longer denoising step of a server is interrupted to let other work run."""
    text_slice_seconds: float = 0.011
    """The same while text is being decoded in the same process."""
    logits_rows: int = 512
    """Text tokens whose logits are in memory at a time in training; those of the others are
    computed again in the backward pass."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.type == "int":
                require(value >= 1, f"{field.name} must be at least 1, got {value}")
            elif field.type == "float":
                require(value >= 0, f"{field.name} must be at least 0, got {value}")


def plan_execution(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    free_bytes: int | None = None,
    attention: str = "auto",
) -> ExecutionPlan:
    """The plan of a model of this config in `dtype` on a device, with an attention backend.

    `free_bytes` is the device's free memory (`free_memory`): the paged cache may take half of it,
    and so may copies of prefixes, up to PREFIX_BYTES, and what one call works with (an image is
    never cut; the branches of a large one are called apart, see `branches_apart`); None sets no
    bound. It is rounded down to a power of two, so that small differences leave the plan of a
    machine as it is. It decides how much fits at once, not what is computed: training, which is
    exact to the bit, does not use it. All devices have the limits of CPUs so far.
    """
    defaults = ExecutionPlan()
    token = config.kv_bytes(dtype.itemsize)
    kv_blocks, prefix_bytes = defaults.kv_blocks, PREFIX_BYTES
    rows = {"und": PREFILL_ROWS, "gen": PREFILL_ROWS}
    branch_rows = UNLIMITED
    if free_bytes is not None:
        half = half_of(free_bytes)
        branch_rows = max(1, fitting_branch_rows(config, dtype.itemsize, free_bytes))
        prefix_bytes = min(prefix_bytes, half)
        kv_blocks = min(kv_blocks, half // (defaults.kv_block_size * token))
        for stream, most in rows.items():
            fitting = int(half // row_bytes(config, stream, dtype.itemsize))
            rows[stream] = min(most, max(MIN_ROWS, fitting))
    return ExecutionPlan(
        device=str(device),
        attention=attention,
        kv_blocks=max(1, kv_blocks),
        prefill_rows=rows["und"],
        denoise_rows=rows["gen"],
        branch_rows=branch_rows,
        prefix_rows=max(1, min(defaults.prefix_rows, prefix_bytes // token)),
        logits_rows=max(1, LOGITS // config.vocab_size),
    )


def measured_plan(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, attention: str = "auto"
) -> ExecutionPlan:
    """The plan for the memory that is free on the device now, once the model is loaded."""
    free = free_memory(device)
    return plan_execution(config, device, dtype, free_bytes=free, attention=attention)


def free_memory(device: torch.device) -> int | None:
    """Free memory of a device in bytes; None where it is not reported."""
    import torch

    if abilities(device).unified:
        return available_bytes()
    if device.type not in ("cuda", "xpu"):
        return None
    module = torch.cuda if device.type == "cuda" else torch.xpu
    try:
        free = module.mem_get_info(device)[0]
    except RuntimeError:
        if device.type == "cuda":
            raise
        return None  # drivers of xpu that cannot be asked
    # Memory that torch reserves without using it is free for tensors.
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def half_of(free_bytes: int) -> int:
    """At most half of so many free bytes, and more than a quarter: a power of two."""
    return 2 ** max(free_bytes, 1).bit_length() // 4


def fitting_branch_rows(config: ModelConfig, itemsize: float, free_bytes: int) -> int:
    """Rows of the generation stream whose working memory is at most `half_of` what is free."""
    head = head_bytes(config, itemsize, clip=config.video is not None)
    return int(half_of(free_bytes) // max(row_bytes(config, "gen", itemsize), head))


def branches_apart(tokens: int, rows: int, limit: int) -> bool:
    """Whether each guidance branch of an image of `tokens` tokens has a separate call.

    The rule of the denoiser and of the memory plan: all branches together, `rows` in one call,
    unless the image has APART_TOKENS or more and the call more than `limit` rows, those that
    `fitting_branch_rows` has memory for.
    """
    return tokens >= APART_TOKENS and rows > limit


def row_bytes(config: ModelConfig, stream: str, itemsize: float) -> float:
    """Working memory of a row of one stream, in the layer that needs most.

    4 D + 2 Q + 2 V + 3 W numbers, Q and V the widths of queries and values, W that of the MLP; of
    experts W is the sum over those of a token, and each adds 3 D.
    """
    d = config.hidden_size
    mlp, numbers = config.mlps[stream], range(config.num_layers)
    widths = []
    if not all(mlp.is_sparse(n) for n in numbers):
        widths.append(3 * mlp.width)
    if any(mlp.is_sparse(n) for n in numbers):
        widths.append(3 * mlp.experts_per_token * (mlp.expert_width + d))
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    return itemsize * (4 * d + 2 * heads + max(widths))


def head_bytes(config: ModelConfig, itemsize: float, *, clip: bool = False) -> float:
    """Working memory of a row in the image or video head, whose result is cast to float32."""
    if clip and not config.clips_are_images:
        cast = 0 if itemsize == 4 else itemsize
        return itemsize * 2 * config.hidden_size + (4 + cast) * config.tube_width
    inner = config.flow_head_width if config.image_head == "flow" else config.token_width
    values = 2 * config.hidden_size + 2 * inner + config.token_width
    return itemsize * values + 4 * config.token_width
