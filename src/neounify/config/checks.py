"""Checks of a ModelConfig: ranges, bounds, and fields that have to fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from neounify.config.capabilities import Capability
from neounify.config.model import (
    ImageHead,
    MlpConfig,
    ModelConfig,
    PatchEmbedding,
    PromptForm,
    UndPixels,
    require,
    require_one_of,
)

MAX_WIDTH, MAX_POSITIONS, MAX_TUBE_FRAMES = 2**20, 2**40, 1024
LIMITS: Mapping[str, int] = {
    "hidden_size": MAX_WIDTH,
    "num_layers": 1000,
    "num_heads": MAX_WIDTH,
    "num_kv_heads": MAX_WIDTH,
    "head_dim": MAX_WIDTH,
    "vocab_size": 2**24,
    "max_positions": MAX_POSITIONS,
    "max_grid": MAX_POSITIONS,
    "patch_size": 1024,
    "merge": 16,
    "channels": 16,
    "vision_hidden_size": MAX_WIDTH,
    "flow_head_width": MAX_WIDTH,
}
"""Greatest sizes, far above those of any model: a file that names more is damaged, or means harm.

Names and shapes of all tensors are listed before weights are read, and their bytes fit 64 bits.
"""


def check_size(name: str, value: int) -> None:
    """Check one of the sizes in LIMITS. Raises ConfigError."""
    require(value >= 1, f"{name} must be at least 1, got {value}")
    require(value <= LIMITS[name], f"{name} must be at most {LIMITS[name]:,}, got {value:,}")


def check_model(c: ModelConfig) -> None:
    """Check sizes and conventions of a model. Raises ConfigError."""
    for name in LIMITS:
        check_size(name, getattr(c, name))
    require(
        c.num_heads % c.num_kv_heads == 0,
        f"num_heads {c.num_heads} must be a multiple of num_kv_heads {c.num_kv_heads}",
    )
    require(
        c.head_dim % 8 == 0,
        f"head_dim {c.head_dim} must be a multiple of 8: it is cut into a half and two quarters, "
        "each rotated in pairs",
    )
    require(
        c.vision_hidden_size % 4 == 0,
        f"vision hidden size {c.vision_hidden_size} must be divisible by 4 (two rotated halves)",
    )
    if c.image_head == "pixel":
        require(
            c.hidden_size % 4 == 0 and c.token_size % 4 == 0,
            f"the pixel head needs a hidden size ({c.hidden_size}) and a token side "
            f"({c.token_size}) that are divisible by 4",
        )
    for name, known in (
        ("image_head", ImageHead),
        ("patch_embed", PatchEmbedding),
        ("und_pixels", UndPixels),
        ("template", PromptForm),
    ):
        require_one_of(name, getattr(c, name), known)
    require(bool(c.capabilities), "capabilities must name what the model was trained for")
    for capability in c.capabilities:
        require_one_of("capability", capability, Capability)
    _check_video(c)
    for name in ("rope_theta", "rope_theta_hw", "rope_theta_vision", "rms_norm_eps"):
        value = getattr(c, name)
        require(0 < value < math.inf, f"{name} must be positive and finite, got {value}")
    for stream, mlp in c.mlps.items():
        _check_mlp(stream, mlp, c.num_layers)
    c.sampling.check_sizes(c.token_size)


def _check_video(c: ModelConfig) -> None:
    if c.video is None:
        generated = {"generate_video", "continue_video"}.intersection(c.capabilities)
        require(not generated, "a model without tubes generates no videos")
        return
    video, side = c.sampling.video, c.token_size
    require(
        c.video.tube_frames <= MAX_TUBE_FRAMES,
        f"tube_frames must be at most {MAX_TUBE_FRAMES:,}, got {c.video.tube_frames:,}",
    )
    require(
        len(video.size) == 2 and all(n >= side and n % side == 0 for n in video.size),
        f"sampling.video.size {video.size} must be (width, height), multiples of {side}",
    )
    require(
        video.frames % c.video.tube_frames == 0,
        f"sampling.video.frames {video.frames} must be a multiple of tube_frames "
        f"{c.video.tube_frames}",
    )
    require(
        not c.video.frame_by_frame or c.template == "neo",
        f"frame_by_frame has prompts of the form 'neo', not {c.template!r}",
    )


def _check_mlp(stream: str, mlp: MlpConfig, num_layers: int) -> None:
    for name in ("width", "num_experts", "expert_width"):
        value = getattr(mlp, name)
        require(
            value <= MAX_WIDTH, f"{stream}: {name} must be at most {MAX_WIDTH:,}, got {value:,}"
        )
    if not mlp.sparse or not all(mlp.sparse):
        require(mlp.width >= 1, f"the {stream} MLP width must be at least 1, got {mlp.width}")
    if not any(mlp.sparse):
        return
    require(
        len(mlp.sparse) == num_layers,
        f"{stream}: {len(mlp.sparse)} layers are marked sparse or dense, expected {num_layers}",
    )
    require(
        1 <= mlp.experts_per_token <= mlp.num_experts,
        f"{stream}: experts per token {mlp.experts_per_token} must lie in 1..{mlp.num_experts}, "
        "the number of experts",
    )
    require(mlp.expert_width >= 1, f"{stream}: expert width {mlp.expert_width} must be positive")
