"""What a model is made of: frozen dataclasses, validated once, never mutated.

Foreign files become a ModelConfig at the edge, in `checkpoint/config_json.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from neounify.errors import ConfigError

NoiseScaleMode = Literal["fixed", "resolution", "dynamic", "dynamic_sqrt"]
ImageHead = Literal["flow", "pixel"]


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """The MLPs of one stream: dense everywhere, or sparse in the layers `sparse` marks.

    `width` is the hidden width of a dense MLP, `expert_width` that of one expert.
    """

    width: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    normalise_top_k: bool = False
    sparse: tuple[bool, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        return bool(self.sparse) and self.sparse[layer]


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The noise and time conventions the weights were trained with."""

    noise_scale: float = 1.0
    noise_scale_mode: NoiseScaleMode = "resolution"
    noise_scale_base_tokens: int = 64
    noise_scale_max: float = 8.0
    noise_scale_embedding: bool = True
    t_eps_training: float = 0.05


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What a checkpoint wants to be sampled with; the defaults are the published models'.

    Areas are in pixels. A checkpoint may carry its own values in the section
    `"neounify": {"sampling": {...}}` of its config.json.
    """

    image_size: tuple[int, int] = (2048, 2048)
    chat_min_pixels: int = 256**2
    chat_max_pixels: int = 2048**2
    edit_min_pixels: int = 512**2
    edit_max_pixels: int = 2048**2
    edit_max_total_pixels: int = 4096**2
    steps: int = 50
    guidance: float = 4.0
    image_guidance: float = 1.0
    shift: float = 3.0
    trained_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) pairs the model was trained to generate; empty: not recorded."""
    trained_pixels: tuple[int, int] | None = None
    """(least, greatest) area of training images of any shape; None: not recorded."""

    def edit_bounds(self, num_images: int) -> tuple[int, int]:
        """(minimum, maximum) area of each of `num_images` input pictures of an edit."""
        share = self.edit_max_total_pixels // max(1, num_images)
        return self.edit_min_pixels, min(self.edit_max_pixels, share)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and conventions of one model. Raises ConfigError when they do not fit together."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    und_mlp: MlpConfig
    gen_mlp: MlpConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    rope_theta_hw: float = 1e4
    max_positions: int = 262_144
    max_grid: int = 10_000
    attention_bias: bool = False
    tie_embeddings: bool = False
    patch_size: int = 16
    merge: int = 2
    vision_hidden_size: int = 1024
    rope_theta_vision: float = 1e4
    image_head: ImageHead = "flow"
    flow_head_width: int = 4096
    flow: FlowConfig = field(default_factory=FlowConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    published: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The config.json this came from; saving keeps the keys this package does not know."""

    def __post_init__(self) -> None:
        _check_model(self)

    @property
    def token_size(self) -> int:
        """Side of an image token in pixels (C in the specification)."""
        return self.patch_size * self.merge

    @property
    def is_sparse(self) -> bool:
        return self.und_mlp.num_experts > 0

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def _check_model(c: ModelConfig) -> None:
    sizes = (
        "hidden_size num_layers num_heads num_kv_heads head_dim vocab_size max_positions max_grid "
        "patch_size merge vision_hidden_size flow_head_width"
    )
    for name in sizes.split():
        _require(getattr(c, name) >= 1, f"{name} must be at least 1, got {getattr(c, name)}")
    _require(
        c.num_heads % c.num_kv_heads == 0,
        f"num_heads {c.num_heads} must be a multiple of num_kv_heads {c.num_kv_heads}",
    )
    _require(
        c.head_dim % 8 == 0,
        f"head_dim {c.head_dim} must be a multiple of 8: it is cut into a half and two quarters, "
        "each rotated in pairs",
    )
    _require(
        c.vision_hidden_size % 4 == 0,
        f"vision hidden size {c.vision_hidden_size} must be divisible by 4 (two rotated halves)",
    )
    if c.image_head == "pixel":
        _require(
            c.hidden_size % 4 == 0 and c.token_size % 4 == 0,
            f"the pixel head needs a hidden size ({c.hidden_size}) and a token side "
            f"({c.token_size}) that are divisible by 4",
        )
    for name in ("rope_theta", "rope_theta_hw", "rope_theta_vision", "rms_norm_eps"):
        _require(getattr(c, name) > 0, f"{name} must be positive, got {getattr(c, name)}")
    for stream, mlp in (("und", c.und_mlp), ("gen", c.gen_mlp)):
        _check_mlp(stream, mlp, c.num_layers)
    _check_flow(c.flow)
    _check_sampling(c.sampling, c.token_size)


def _check_mlp(stream: str, mlp: MlpConfig, num_layers: int) -> None:
    if not mlp.sparse or not all(mlp.sparse):
        _require(mlp.width >= 1, f"the {stream} MLP width must be at least 1, got {mlp.width}")
    if not any(mlp.sparse):
        return
    _require(
        len(mlp.sparse) == num_layers,
        f"{stream}: {len(mlp.sparse)} layers are marked sparse or dense, expected {num_layers}",
    )
    _require(
        1 <= mlp.experts_per_token <= mlp.num_experts,
        f"{stream}: experts per token {mlp.experts_per_token} must lie in 1..{mlp.num_experts}, "
        "the number of experts",
    )
    _require(mlp.expert_width >= 1, f"{stream}: expert width {mlp.expert_width} must be positive")


def _check_flow(flow: FlowConfig) -> None:
    _require(
        flow.noise_scale_mode in get_args(NoiseScaleMode),
        f"noise_scale_mode {flow.noise_scale_mode!r} is unknown; known are "
        f"{', '.join(get_args(NoiseScaleMode))}",
    )
    for name in ("noise_scale", "noise_scale_base_tokens", "noise_scale_max", "t_eps_training"):
        _require(getattr(flow, name) > 0, f"{name} must be positive, got {getattr(flow, name)}")


def _check_sampling(s: SamplingConfig, token: int) -> None:
    _require(
        len(s.image_size) == 2
        and all(side >= token and side % token == 0 for side in s.image_size),
        f"sampling.image_size {s.image_size} must be (width, height), multiples of {token}",
    )
    for low, high in (
        (s.chat_min_pixels, s.chat_max_pixels),
        (s.edit_min_pixels, s.edit_max_pixels),
        (s.edit_min_pixels, s.edit_max_total_pixels),
    ):
        _require(1 <= low <= high, f"sampling: pixel bounds {low}..{high} are not a range")
    _require(
        all(
            len(size) == 2 and all(side >= token and side % token == 0 for side in size)
            for size in s.trained_sizes
        ),
        f"sampling.trained_sizes {s.trained_sizes} must be (width, height) pairs, multiples of "
        f"{token}",
    )
    low, high = s.trained_pixels or (1, 1)
    _require(1 <= low <= high, f"sampling.trained_pixels {low}..{high} is not a range")
    _require(s.steps >= 1, f"sampling.steps must be at least 1, got {s.steps}")
    _require(s.shift > 0, f"sampling.shift must be positive, got {s.shift}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
