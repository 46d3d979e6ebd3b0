"""ModelConfig: the sizes and conventions of one checkpoint, and its defaults for requests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from neounify.config.capabilities import CAPABILITIES, Capability
from neounify.config.sampling import SolverName, range_error
from neounify.errors import ConfigError, RequestError

ImageHead = Literal["flow", "pixel", "linear"]
PatchEmbedding = Literal["conv", "linear"]
PromptForm = Literal["neo", "pixelumm"]
UndPixels = Literal["imagenet", "symmetric"]
NoiseDraw = Literal["image", "tokens"]
NoiseScaleMode = Literal["fixed", "resolution", "dynamic", "dynamic_sqrt"]
"""Dependence of σ on the number of image tokens; the formulas are in `flow/path.py`."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Noise and time conventions of a checkpoint. Raises ConfigError."""

    noise_scale: float = 1.0
    """s, the noise scale at `noise_scale_base_tokens` tokens; above 0."""
    noise_scale_mode: NoiseScaleMode = "resolution"
    """Growth of σ with the number of image tokens."""
    noise_scale_base_tokens: int = 64
    """n0, the number of image tokens at which σ equals `noise_scale`."""
    noise_scale_max: float = 8.0
    """Upper bound of σ in sampling; training does not apply it."""
    noise_scale_embedding: bool = True
    """Whether σ is embedded beside t."""
    t_eps_training: float = 0.05
    """The smallest 1 - t by which training divides a velocity."""
    t_eps_sampling: float | None = None
    """The smallest 1 - t by which sampling divides a velocity; None: `flow.path.sampling_t_eps`."""
    time_embedding: bool = True
    """Whether t is embedded and added to the noisy tokens."""
    unread_time_embedder: bool = False
    """Whether the checkpoint holds an embedder of t all the same, which nothing reads."""
    noise_draw: NoiseDraw = "image"
    """Shape of one draw of noise: [3, height, width], or [tokens, values of a token]."""
    first_time: float = 0.0
    """Time at which sampling starts before the shift, 0 to 1; the noise is used there as it is."""
    guidance_end_open: bool = False
    """Whether a step at the upper end of the guidance interval is unguided."""
    unipc_grid: int = 0
    """The solver unipc evaluates the velocity where 1 - t is cut to a multiple of 1 / unipc_grid;
    0: at t itself."""
    restart_solver: bool = True
    """Whether solvers forget earlier steps where guidance begins or ends to act."""

    def __post_init__(self) -> None:
        require(
            self.noise_scale_mode in get_args(NoiseScaleMode),
            f"noise_scale_mode {self.noise_scale_mode!r} is unknown; known are "
            f"{', '.join(get_args(NoiseScaleMode))}",
        )
        require_one_of("noise_draw", self.noise_draw, NoiseDraw)
        for name in (
            "noise_scale",
            "noise_scale_base_tokens",
            "noise_scale_max",
            "t_eps_training",
            "t_eps_sampling",
        ):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf,
                f"{name} must be positive and finite, got {value}",
            )
        require(self.unipc_grid >= 0, f"unipc_grid must be 0 or more, got {self.unipc_grid}")
        require(
            0 <= self.first_time < 1,
            f"first_time must be at least 0 and below 1, got {self.first_time}",
        )


def require_one_of(name: str, value: object, known: object) -> None:
    names = get_args(known)
    require(value in names, f"{name} {value!r} is unknown; known are {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class VideoDefaults:
    """Sizes and sampling values of videos; the defaults are those of the published PixelUMM.

    Areas are in pixels, sizes are (width, height) in pixels. Raises ConfigError.
    """

    size: tuple[int, int] = (832, 480)
    """Size of a generated video, multiples of the token side."""
    frames: int = 96
    """Frames of a generated video, a multiple of the frames of a tube."""
    fps: float = 24.0
    """Frames per second of a generated video."""
    steps: int = 35
    """Denoising steps of a video, 1 to MAX_STEPS."""
    dpm_steps: int = 0
    """Denoising steps of a video by the solver dpm2m, 0 to MAX_STEPS; 0: `steps`."""
    guidance: float = 6.0
    """Guidance scale of the prompt of a video, 0 to MAX_GUIDANCE; 0 to 1 is none."""
    shift: float = 10.0
    """Timestep shift of a video towards noise, 1 / MAX_SHIFT to MAX_SHIFT; 1 is none."""
    solver: SolverName = "unipc"
    """ODE solver of a video."""
    frame_min_pixels: int = 256
    """Smaller frames of an input video are enlarged to this area."""
    frame_max_pixels: int = 448**2
    """Larger frames of an input video are reduced to this area."""
    max_total_pixels: int = 96 * 448**2
    """Area of all sampled frames of an input video together."""
    max_frames: int = 96
    """Frames sampled of an input video at most."""
    sample_fps: float = 1.0
    """Frames sampled of a second of an input video, each an image."""
    tube_fps: float = 4.0
    """Frames sampled of a second of an input video for tubes."""

    def __post_init__(self) -> None:
        low, high, total = self.frame_min_pixels, self.frame_max_pixels, self.max_total_pixels
        require(
            1 <= low <= high <= total, f"video: pixel bounds {low}..{high}..{total} do not ascend"
        )
        for name in ("frames", "max_frames"):
            require(getattr(self, name) >= 1, f"video.{name} must be at least 1")
        for name in ("fps", "sample_fps", "tube_fps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"video.{name} must be positive and finite, got {value}")
        for name in ("steps", "shift", "guidance"):
            error = range_error(name, getattr(self, name))
            require(error is None, f"video.{error}")
        error = range_error("steps", self.dpm_steps) if self.dpm_steps else None
        require(error is None, f"video.dpm_{error}")
        require_one_of("video.solver", self.solver, SolverName)


@dataclass(frozen=True, kw_only=True)
class CheckpointDefaults:
    """Sizes and sampling values of a checkpoint; the defaults are the published models'.

    Areas are in pixels, sizes are (width, height) in pixels. A checkpoint may carry other values
    in the section `"neounify": {"sampling": {...}}` of its config.json. Raises ConfigError.
    """

    image_size: tuple[int, int] = (2048, 2048)
    """Size of a generated image, multiples of the token side."""
    chat_min_pixels: int = 256**2
    """Smaller input images of a chat are enlarged to this area."""
    chat_max_pixels: int = 2048**2
    """Larger input images of a chat are reduced to this area."""
    edit_min_pixels: int = 512**2
    """Smaller input images of an edit are enlarged to this area."""
    edit_max_pixels: int = 2048**2
    """Larger input images of an edit are reduced to this area."""
    edit_max_total_pixels: int = 4096**2
    """Area of all input images of an edit together."""
    steps: int = 50
    """Denoising steps, 1 to MAX_STEPS."""
    guidance: float = 4.0
    """Guidance scale of the prompt, 0 to MAX_GUIDANCE; 0 to 1 is none."""
    image_guidance: float = 1.0
    """Guidance scale of the input images of an edit, 0 to MAX_GUIDANCE; 1 is none."""
    shift: float = 3.0
    """Timestep shift towards noise, 1 / MAX_SHIFT to MAX_SHIFT; 1 is none."""
    trained_sizes: tuple[tuple[int, int], ...] = ()
    """Sizes the model was trained to generate; empty: not recorded."""
    trained_pixels: tuple[int, int] | None = None
    """(least, greatest) area of training images of any shape; None: not recorded."""
    solver: SolverName = "euler"
    """ODE solver of an image."""
    video: VideoDefaults = field(default_factory=VideoDefaults)
    """Sizes and sampling values of videos."""

    def __post_init__(self) -> None:
        for low, high in (
            (self.chat_min_pixels, self.chat_max_pixels),
            (self.edit_min_pixels, self.edit_max_pixels),
            (self.edit_min_pixels, self.edit_max_total_pixels),
        ):
            require(1 <= low <= high, f"sampling: pixel bounds {low}..{high} are not a range")
        low, high = self.trained_pixels or (1, 1)
        require(1 <= low <= high, f"sampling.trained_pixels {low}..{high} is not a range")
        for name in ("steps", "shift", "guidance", "image_guidance"):
            error = range_error(name, getattr(self, name))
            require(error is None, f"sampling.{error}")
        require_one_of("sampling.solver", self.solver, SolverName)

    def of_video(self, solver: SolverName | None = None) -> CheckpointDefaults:
        """The same defaults with those of videos in place of images'.

        `solver` is the one a request names, which may have other steps.
        """
        video = self.video
        dpm_steps = video.dpm_steps if (solver or video.solver) == "dpm2m" else 0
        return dataclasses.replace(
            self,
            image_size=video.size,
            steps=dpm_steps or video.steps,
            guidance=video.guidance,
            shift=video.shift,
            solver=video.solver,
            trained_sizes=(),
            trained_pixels=None,
        )

    def edit_bounds(self, num_images: int) -> tuple[int, int]:
        """(minimum, maximum) area of each of the `num_images` input images of an edit.

        The total goes before the minimum: so many images share it that each may be smaller.
        """
        share = self.edit_max_total_pixels // max(1, num_images)
        maximum = max(1, min(self.edit_max_pixels, share))
        return min(self.edit_min_pixels, maximum), maximum

    def check_sizes(self, token_size: int) -> None:
        """ConfigError unless all sizes are multiples of the token side."""

        def fits(size: tuple[int, ...]) -> bool:
            sides = [side >= token_size and side % token_size == 0 for side in size]
            return len(sides) == 2 and all(sides)

        require(
            fits(self.image_size),
            f"sampling.image_size {self.image_size} must be (width, height), multiples of "
            f"{token_size}",
        )
        require(
            all(fits(size) for size in self.trained_sizes),
            f"sampling.trained_sizes {self.trained_sizes} must be (width, height) pairs, "
            f"multiples of {token_size}",
        )


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """The MLPs of one stream: dense, or a mixture of experts in the layers that `sparse` marks."""

    width: int
    """Hidden width of a dense MLP; unused where every layer is sparse."""
    num_experts: int = 0
    """Experts of a sparse layer."""
    experts_per_token: int = 0
    """Experts that each token is routed to, at most `num_experts`."""
    expert_width: int = 0
    """Hidden width of one expert."""
    normalise_top_k: bool = False
    """Whether the weights of a token's experts are scaled to sum to 1."""
    sparse: tuple[bool, ...] = ()
    """By layer, whether it is sparse; empty: all are dense."""

    def is_sparse(self, layer: int) -> bool:
        return bool(self.sparse) and self.sparse[layer]


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Video of a model: `tube_frames` frames of a token's side are one token, a tube.

    The generation stream has an embedding and a head of tubes, or those of images do for tubes of
    one frame: so a model of images becomes one of clips without new weights. Raises ConfigError.
    """

    tube_frames: int = 4
    """Frames of a tube (F)."""
    und: bool = False
    """Whether the understanding stream has an embedding of tubes too."""
    position_fps: float = 24.0
    """Frames per second at which a tube takes one step of t; at others it takes this / fps."""
    image_weights: bool = False
    """Whether frames to generate are embedded and read out as images are; tubes of one frame."""
    frame_by_frame: bool = False
    """Whether frames are generated one after the other, each behind its time and those made before
    it as clean images (`text.clips.frame_order`); else all together. Needs `image_weights`."""

    def __post_init__(self) -> None:
        require(self.tube_frames >= 1, f"tube_frames must be at least 1, got {self.tube_frames}")
        require(
            not self.image_weights or (self.tube_frames == 1 and not self.und),
            "image_weights are for tubes of one frame that are seen as images: "
            f"tube_frames {self.tube_frames} must be 1, und false",
        )
        require(
            self.image_weights or not self.frame_by_frame,
            "frame_by_frame is for frames that are images: image_weights must be true",
        )
        require(
            0 < self.position_fps < math.inf,
            f"position_fps must be positive and finite, got {self.position_fps}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and conventions of one model. Raises ConfigError when they do not fit together."""

    hidden_size: int
    """Width of the residual stream (D)."""
    num_layers: int
    """Transformer layers."""
    num_heads: int
    """Query heads, a multiple of `num_kv_heads`."""
    num_kv_heads: int
    """Heads of keys and values."""
    head_dim: int
    """Width of a head, a multiple of 8: half rotates with t, a quarter each with row and column."""
    vocab_size: int
    """Rows of the token embedding."""
    und_mlp: MlpConfig
    """MLPs of the understanding stream."""
    gen_mlp: MlpConfig
    """MLPs of the generation stream."""
    family: str = "sensenova-u1"
    """Family of checkpoints, a key of `FAMILIES` in `config/families.py`."""
    template: PromptForm = "neo"
    """Form of the prompts, a key of `TEMPLATES` in `text/forms.py`."""
    capabilities: tuple[Capability, ...] = (
        "chat",
        "generate",
        "edit",
        "interleave",
        "think",
        "chat_video",
    )
    """What the model was trained for; requests for anything else are refused."""
    rms_norm_eps: float = 1e-6
    """ε of the RMS norms."""
    rope_theta: float = 5e6
    """Base of the rotary embedding of t."""
    rope_theta_hw: float = 1e4
    """Base of the rotary embeddings of row and column."""
    max_positions: int = 262_144
    """Context length in positions t."""
    max_grid: int = 10_000
    """Token rows or columns of an image at most."""
    attention_bias: bool = False
    """Whether the attention projections have biases."""
    tie_embeddings: bool = False
    """Whether the text head shares the token embedding."""
    lm_head: bool = True
    """Whether there is a text head; without it the model paints and edits, and writes no text."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    merge: int = 2
    """Patches per side of an image token."""
    channels: int = 3
    """Colour channels of an image."""
    patch_embed: PatchEmbedding = "conv"
    """Embedding of image tokens: convolutions of patches, or one Linear over a token's pixels."""
    und_pixels: UndPixels = "imagenet"
    """Pixels that the understanding stream reads: normalised as for ImageNet, or in [-1, 1]."""
    video: VideoConfig | None = None
    """Video of the model; None: it has no tubes."""
    vision_hidden_size: int = 1024
    """Width of a patch embedding of convolutions, a multiple of 4."""
    rope_theta_vision: float = 1e4
    """Base of the rotary embedding of patches."""
    image_head: ImageHead = "flow"
    """Head of the clean image: an MLP, convolutions over pixels, or a norm and a Linear."""
    flow_head_width: int = 4096
    """Hidden width of the flow head."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Noise and time conventions."""
    sampling: CheckpointDefaults = field(default_factory=CheckpointDefaults)
    """Sizes and sampling values for requests that name none."""
    published: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The config.json this came from; saving keeps the keys that this package does not read."""

    def __post_init__(self) -> None:
        from neounify.config.checks import check_model  # which reads the names above

        check_model(self)

    @property
    def token_size(self) -> int:
        """Side of an image token in pixels (C in the specification)."""
        return self.patch_size * self.merge

    @property
    def token_width(self) -> int:
        """Numbers in an image token: channels · token_size²."""
        return self.channels * self.token_size**2

    @property
    def tube_width(self) -> int:
        """Numbers in a tube; 0 without video."""
        return self.video.tube_frames * self.token_width if self.video is not None else 0

    @property
    def clips_are_images(self) -> bool:
        """Whether frames to generate are embedded and read out as images are."""
        return self.video is not None and self.video.image_weights

    @property
    def frame_by_frame(self) -> bool:
        """Whether the frames of a clip are generated one after the other."""
        return self.video is not None and self.video.frame_by_frame

    @property
    def seen_tube_frames(self) -> int:
        """Frames of a tube that the understanding stream embeds; 1 where it sees images alone."""
        return self.video.tube_frames if self.video is not None and self.video.und else 1

    @property
    def sees_tubes(self) -> bool:
        """Whether the understanding stream has an embedding of tubes."""
        return self.video is not None and self.video.und

    def check_can(self, capability: Capability) -> None:
        """Raise RequestError, in one sentence, for what the model was not trained for."""
        if capability not in self.capabilities:
            from neounify.config.families import title_of  # only a refusal needs it

            able = ", ".join(CAPABILITIES[name] for name in self.capabilities)
            raise RequestError(
                f"this {title_of(self.family)} model was not trained to {CAPABILITIES[capability]};"
                f" it can {able}"
            )

    @property
    def mlps(self) -> Mapping[str, MlpConfig]:
        """MLPs by the name of the stream."""
        return {"und": self.und_mlp, "gen": self.gen_mlp}

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of one token's keys and values in all layers, at `itemsize` bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    @property
    def pairs_per_row(self) -> float:
        """κ: (query, key) pairs of a layer that take as long as one row in it, by multiply-adds.

        A pair has 2 · heads · d; a row those of the projections and of the MLP, of a sparse one the
        experts of a token. The mean over the layers of `und`: 23,552 for 8B, 6,944 for A3B.
        """
        mlp, layers = self.und_mlp, range(self.num_layers)
        expert = mlp.experts_per_token * 3 * mlp.expert_width + mlp.num_experts
        widths = sum(expert if mlp.is_sparse(n) else 3 * mlp.width for n in layers)
        projections = 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        row = self.hidden_size * (projections + widths / self.num_layers)
        return row / (2 * self.num_heads * self.head_dim)

    @property
    def is_sparse(self) -> bool:
        return self.und_mlp.num_experts > 0

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)
