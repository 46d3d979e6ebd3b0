"""Peak memory and time of inference from sizes alone, before a weight is read.

Units of residency: the layers of each stream, what a stream has besides, and what both share: the
embedding, the text head and LoRA adapters beside codes, which stay in every mode. With ℓ, the bytes
of the largest layer of a stream as kept, a device peaks at 1.03 (fragments) times

    all       both streams + shared + A
    stream    the larger of und + A of prefill, and gen + A of denoising, + shared
    layers    (r + 3) ℓ + rest + shared + A, of the stream that needs most; r layers stay, three
              are buffers

plus 0.5 GB (context). On the CPU weights are used where the file is mapped: one layer at a time is
there besides the r, nothing is locked, a text head that is mapped counts with und alone, and what
the process takes without weights is added: PROCESS, or as it was measured (`rates.process_bytes`).

A is the working memory of the largest call: its rows (`runtime.plan.row_bytes`), keys and values
of the prefixes, copies of them where attention makes some, and 24 bytes a value of float32 state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from neounify.config import ModelConfig
from neounify.runtime.plan import (
    MIN_ROWS,
    PREFILL_ROWS,
    UNLIMITED,
    branches_apart,
    head_bytes,
    row_bytes,
)

StreamName = Literal["und", "gen"]
STREAMS: tuple[StreamName, ...] = get_args(StreamName)
Mode = Literal["all", "stream", "layers"]
MODES: tuple[Mode, ...] = get_args(Mode)
TaskKind = Literal["t2i", "edit", "chat", "interleave", "t2v"]

FRAGMENTS, CONTEXT = 1.03, 0.5e9
SLOTS, STAGING = 3, 2
"""Layers of a device that streamed ones pass through, and buffers of a layer locked on the host."""
PROCESS = 0.30e9
"""Resident bytes of Python, torch and the package on the CPU, where a process cannot be measured;
see docs/memory.md."""
PIECE_BYTES, PIECES = 2**26, 7
"""Bytes of a clip's point that moves at once, and tensors of that size that it takes to
move; glibc gives blocks above 32 MiB back, while smaller ones leave holes."""
COPIED_TOKENS = 512
"""Tokens up to which images share a copy of their prefixes with attention "sdpa", the default."""
PROMPT_TOKENS = 256
"""Tokens of a prompt with its system message, where none is given."""
STAMP_TOKENS = 8
"""Tokens of the time in front of a frame or tube, and of the marks around it, about."""
SCALE_BYTES = 4
"""Bytes of the scale of a row of codes, float32."""

# --- weights ---


@dataclass(frozen=True)
class Unit:
    """Parameters of a unit: `codes` in matrices that a preset quantises, in `rows` rows, `rest`."""

    codes: int = 0
    rows: int = 0
    rest: int = 0

    def bytes(self, itemsize: float, bits: int | None = None) -> float:
        """As kept at `itemsize` bytes a number; with `bits`, codes so wide and a scale per row."""
        if bits is None:
            return (self.codes + self.rest) * itemsize
        return self.codes * bits / 8 + self.rows * SCALE_BYTES + self.rest * itemsize


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of the units of residency, as kept.

    `layers` of each stream in order; `rest`: patch embedding and final norm, of the generation
    stream also the scalar embedders and the image head. `lm_head` is 0 where there is none, or it
    is the embedding, `head_mapped` whether a CPU uses it where its file is mapped, so that images
    do not touch it. `adapters`: LoRA adapters beside codes. `staged`: the largest layer as files
    hold it, where layers are converted from that. `making`: what the work of quantising takes
    beside its results, where weights are quantised as they come.
    """

    layers: Mapping[StreamName, Sequence[float]]
    rest: Mapping[StreamName, float]
    embedding: float
    lm_head: float
    head_mapped: bool = True
    adapters: float = 0
    staged: Mapping[StreamName, float] = field(default_factory=dict)
    making: float = 0

    @property
    def shared(self) -> float:
        """What is of no stream, and always there."""
        return self.embedding + self.lm_head + self.adapters

    def stream(self, name: StreamName) -> float:
        """All layers of a stream."""
        return sum(self.layers[name])

    def largest(self, name: StreamName) -> float:
        """ℓ: the largest layer of a stream."""
        return max(self.layers[name])

    def locked(self, name: StreamName) -> float:
        """Bytes of the buffers on the host that the layers of a stream pass through."""
        return STAGING * self.staged.get(name, self.largest(name))

    def slots(self, name: StreamName, *, unified: bool) -> float:
        """Bytes of layers that come and go: on the CPU the one in use, else the slots.

        A layer that is stored otherwise than it is kept, or updated, is converted from its slot.
        """
        largest = self.largest(name)
        if unified:
            return largest
        staged = self.staged.get(name)
        return SLOTS * largest if staged is None else SLOTS * staged + largest


def layer_unit(config: ModelConfig, stream: StreamName, number: int) -> Unit:
    """Parameters of one stream in one layer; `codes` are those of its linear layers."""
    d, q, v = config.hidden_size, _queries(config), _values(config)
    mlp = config.mlps[stream]
    matrices = [(q, d), (v, d), (v, d), (d, q)]
    rest = 2 * d + 2 * config.head_dim + (q + 2 * v + d if config.attention_bias else 0)
    width, copies = mlp.width, 1
    if mlp.is_sparse(number):
        width, copies = mlp.expert_width, mlp.num_experts
        rest += mlp.num_experts * d
    matrices += [(width, d), (width, d), (d, width)] * copies
    return Unit(sum(n * k for n, k in matrices), sum(n for n, _ in matrices), rest)


def rest_units(config: ModelConfig) -> dict[StreamName, Unit]:
    """Parameters of each stream outside its layers."""
    d, vision, flow = config.hidden_size, config.vision_hidden_size, config.flow
    patch = vision * (config.channels * config.patch_size**2 + 1) + d * (
        vision * config.merge**2 + 1
    )
    if config.patch_embed == "linear":
        patch = (config.token_width + 1) * d
    own_tubes = config.video is not None and not config.clips_are_images
    tube = (config.tube_width + 1) * d if own_tubes else 0
    scalar = (256 + 1) * d + (d + 1) * d
    scalars = scalar * (flow.time_embedding or flow.unread_time_embedder)
    scalars += scalar * flow.noise_scale_embedding
    heads = _head_parameters(config) + (_linear_head(d, config.tube_width) if tube else 0)
    und_tube = tube if config.sees_tubes else 0
    return {
        "und": Unit(rest=patch + und_tube + d),
        "gen": Unit(rest=patch + tube + d + scalars + heads),
    }


def _linear_head(d: int, values: int) -> int:
    return d + (d + 1) * values


def _head_parameters(config: ModelConfig) -> int:
    d, width = config.hidden_size, 1024
    if config.image_head == "flow":
        inner = config.flow_head_width
        return (d + 1) * inner + (inner + 1) * config.token_width
    if config.image_head == "linear":
        return _linear_head(d, config.token_width)
    last = config.channels * (config.token_size // 4) ** 2
    return (d // 4 * 9 + 1) * width + (width // 4 * 9 + 1) * last


def weight_bytes(config: ModelConfig, itemsize: float, bits: int | None = None) -> WeightBytes:
    """Units at `itemsize` bytes a number; with `bits`, linear layers as codes, a scale per row."""
    numbers = range(config.num_layers)
    vocabulary = float(config.vocab_size * config.hidden_size * itemsize)
    return WeightBytes(
        layers={
            name: tuple(layer_unit(config, name, n).bytes(itemsize, bits) for n in numbers)
            for name in STREAMS
        },
        rest={name: unit.bytes(itemsize) for name, unit in rest_units(config).items()},
        embedding=vocabulary,
        lm_head=vocabulary if config.lm_head and not config.tie_embeddings else 0.0,
    )


def _queries(config: ModelConfig) -> int:
    return config.num_heads * config.head_dim


def _values(config: ModelConfig) -> int:
    return config.num_kv_heads * config.head_dim


# --- tasks and their working memory ---


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked of a model: one image at a time, a clip, or text.

    `frames` are those of a clip: of one that is generated, or in a chat of one that is looked at,
    whose `references` are its frames, or with `tubes` its tubes. A clip frame by frame is planned
    as its last frame, an image behind all others.

    `branches` of guidance; `references` images of `reference_tokens` each lie in the prefix of
    every branch, `think` tokens are written before the image (or, in a chat, the answer).
    `copied_tokens`: images that see at most so many tokens, themselves included, have their
    prefixes copied, by the rule of the attention backend (`neounify.attention.copied_tokens`).
    `stream` is the one of a process that works with one alone.
    """

    kind: TaskKind = "t2i"
    width: int = 2048
    height: int = 2048
    steps: int = 50
    branches: int = 2
    references: int = 0
    reference_tokens: int = 0
    think: int = 0
    prompt: int = PROMPT_TOKENS
    frames: int = 0
    tubes: bool = False
    copied_tokens: int = COPIED_TOKENS
    stream: StreamName | None = None

    @property
    def paints(self) -> bool:
        return self.kind != "chat"

    @property
    def streams(self) -> tuple[StreamName, ...]:
        if self.stream is not None:
            return (self.stream,)
        return STREAMS if self.paints else ("und",)

    @property
    def writes(self) -> bool:
        """Whether text is written, which needs the text head."""
        return self.think > 0 or self.kind in ("chat", "interleave")

    @property
    def prefix(self) -> int:
        """Tokens of the prompt, its images and the thought."""
        return self.prompt + self.references * self.reference_tokens + self.think

    def images(self, config: ModelConfig) -> int:
        """Images that are denoised one after the other: the frames of a clip frame by frame."""
        return self.frames if self.paints and self.frames and config.frame_by_frame else 1

    def is_whole_clip(self, config: ModelConfig) -> bool:
        """Whether all frames of a clip are denoised together."""
        return self.paints and self.frames > 0 and not config.frame_by_frame

    def tokens(self, config: ModelConfig) -> int:
        """Tokens of the image or clip, of a clip frame by frame those of a frame; 0 for text."""
        side = config.token_size
        whole = self.is_whole_clip(config)
        tubes = self.frames // config.video.tube_frames if whole and config.video else 1
        return tubes * -(-self.width // side) * -(-self.height // side) if self.paints else 0

    def frame_tokens(self, config: ModelConfig) -> int:
        """Tokens of a finished frame that others follow, with its time and marks, else 0."""
        return self.tokens(config) + STAMP_TOKENS if self.images(config) > 1 else 0

    def seen(self, config: ModelConfig) -> int:
        """Tokens of all finished frames, behind the prompt of the conditional branch alone."""
        return (self.images(config) - 1) * self.frame_tokens(config)


def default_task(config: ModelConfig) -> Task:
    """One image of the checkpoint's default size, steps and guidance, or its default clip.

    The clip where the model generates clips, and one works with more memory than an image.
    """
    image, video = default_image(config), config.sampling.video
    if "generate_video" not in config.capabilities:
        return image
    width, height = video.size
    clip = Task(
        kind="t2v",
        width=width,
        height=height,
        frames=video.frames,
        steps=video.steps,
        branches=2 if video.guidance > 1 else 1,
    )
    return max(image, clip, key=lambda task: denoise_bytes(config, task, 4))


def default_image(config: ModelConfig) -> Task:
    """One image of the checkpoint's default size, steps and guidance."""
    sampling = config.sampling
    width, height = sampling.image_size
    branches = 2 if sampling.guidance > 1 else 1
    return Task(width=width, height=height, steps=sampling.steps, branches=branches)


def state_bytes(config: ModelConfig, tokens: int, *, clip: bool = False) -> int:
    """Float32 state of one image being denoised: 72 · C² bytes a token of three channels.

    Of a clip the point and the three tensors that unipc keeps.
    """
    return (16 * config.tube_width if clip else 24 * config.token_width) * tokens


def step_cache_bytes(config: ModelConfig, tokens: int, itemsize: float) -> float:
    """Residuals of one image and branch: of the first layer and of the rest, old ones and new."""
    return 4 * tokens * config.hidden_size * itemsize


def denoise_bytes(config: ModelConfig, task: Task, itemsize: int, limit: int = UNLIMITED) -> float:
    """A of denoising: rows of a call, state, keys and values of prefixes.

    `limit` is that of `branches_apart`, which says whether a call has the rows of all branches.
    """
    n, runs, seen = task.tokens(config), task.branches, task.seen(config)
    clip = task.is_whole_clip(config)
    apart = branches_apart(n, runs * n, limit)
    together = 1 if apart else runs
    row, head = row_bytes(config, "gen", itemsize), head_bytes(config, itemsize, clip=clip)
    # Predictions of earlier calls of the step; of a clip the point that it moves to, and
    # what moving takes.
    values = n * 4 * config.tube_width if clip else n * 4 * config.token_width
    waiting = (runs - together) * values
    moved = values + PIECES * min(values, PIECE_BYTES) if clip else 0
    rows = max(together * n * row, together * n * head + moved) + waiting
    keys = runs * task.prefix + seen
    if n + task.prefix + seen <= task.copied_tokens:
        keys += runs * (n + task.prefix) + seen
    return rows + state_bytes(config, n, clip=clip) + keys * config.kv_bytes(itemsize)


def prefill_bytes(
    config: ModelConfig, task: Task, itemsize: int, limit: int = PREFILL_ROWS
) -> float:
    """A of prefill: what one call takes, at most `limit` rows, and all keys and values."""
    branches = task.branches if task.paints else 1
    # Each finished frame is read in a separate call.
    rows = max(min(limit, branches * (task.prefix - task.think)), task.frame_tokens(config))
    keys = (branches * task.prefix + task.seen(config)) * config.kv_bytes(itemsize)
    pixels = 0.0
    if task.frames and not task.paints:
        # All frames as they were prepared; those of a call are cut into rows and joined, and those
        # of tubes copied once more by their product.
        width, copies = (config.tube_width, 3) if task.tubes else (config.token_width, 2)
        tokens = task.references * task.reference_tokens
        pixels = (tokens + copies * min(rows, tokens)) * width * itemsize
    return rows * row_bytes(config, "und", itemsize) + keys + pixels


def least_prefill_rows(task: Task) -> int:
    """Rows that one call of prefill must be able to take: an image is never cut."""
    return max(MIN_ROWS, task.reference_tokens)


def working_bytes(
    config: ModelConfig,
    task: Task,
    itemsize: int,
    prefill_rows: int = PREFILL_ROWS,
    branch_rows: int = UNLIMITED,
) -> dict[StreamName, float]:
    """A of each stream that a task uses, with prompts cut into calls of so many rows.

    `branch_rows` is the limit of `branches_apart`.
    """
    working: dict[StreamName, float] = {}
    if "und" in task.streams:
        working["und"] = prefill_bytes(config, task, itemsize, prefill_rows)
    if "gen" in task.streams:
        working["gen"] = denoise_bytes(config, task, itemsize, branch_rows)
    return working


# --- modes ---


def resident_layers(count: int, kept: int) -> tuple[bool, ...]:
    """By layer, whether it stays: `kept` of `count`, spread evenly."""
    if not 0 <= kept <= count:
        raise ValueError(f"{kept} of {count} layers cannot stay")
    return tuple((i + 1) * kept // count > i * kept // count for i in range(count))


def stream_bytes(
    weights: WeightBytes,
    stream: StreamName,
    working: float,
    resident: int | None = None,
    *,
    unified: bool = False,
) -> float:
    """Bytes while one stream works: all of its layers, or `resident` of them and the buffers."""
    fixed = weights.rest[stream] + weights.shared + working
    if unified and stream == "gen" and weights.head_mapped:
        fixed -= weights.lm_head
    layers = weights.layers[stream]
    if resident is None or resident == len(layers):
        return fixed + weights.stream(stream)
    kept = sum(
        b for b, stays in zip(layers, resident_layers(len(layers), resident), strict=True) if stays
    )
    return fixed + kept + weights.slots(stream, unified=unified)


Resident = Mapping[StreamName, int]
"""Layers of each stream that stay."""


def peak_bytes(
    weights: WeightBytes,
    mode: Mode,
    working: Mapping[StreamName, float],
    resident: Resident | None = None,
    *,
    unified: bool = False,
    process: float | None = None,
) -> float:
    """Peak of a mode on a device, or with `unified` the resident size of the process.

    `process` is that without weights, None for PROCESS.
    """
    if mode == "all":
        parts = sum(weights.stream(name) + weights.rest[name] for name in STREAMS)
        least = parts + weights.shared + max(working.values())
    else:
        kept = resident if mode == "layers" and resident is not None else {}
        least = max(
            stream_bytes(weights, name, a, kept.get(name), unified=unified)
            for name, a in working.items()
        )
    least += weights.making
    if unified:
        return least + (PROCESS if process is None else process)
    return FRAGMENTS * least + CONTEXT
