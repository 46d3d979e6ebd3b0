"""The benchmark model with random weights, and prefixes for it."""

from __future__ import annotations

import torch

from neounify.cache import SequenceCache, new_cache
from neounify.config import ModelConfig, VideoConfig
from neounify.config.presets import BENCH
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model import NeoUnify, Text
from neounify.model.build import compile_streams

BENCH_CLIPS = BENCH.replace(
    video=VideoConfig(tube_frames=4), capabilities=(*BENCH.capabilities, "generate_video")
)
"""The same with tubes of 4 frames."""


def random_model(
    dtype: torch.dtype, *, compiled: bool = False, config: ModelConfig = BENCH
) -> NeoUnify:
    torch.manual_seed(0)
    model = NeoUnify(config).to(dtype).eval().requires_grad_(False)
    model.fuse()  # as a loaded one
    if compiled:
        compile_streams(model)
    return model


def random_ids(model: NeoUnify, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()


def read_text(model: NeoUnify, length: int, room: int = 64) -> tuple[SequenceCache, torch.Tensor]:
    """The cache of a random prompt, and the state of its last token [1, D]."""
    cache = new_cache(model, length + room)
    return cache, forward_und(
        model, [ModelInput(cache, (Text(length),), random_ids(model, length))]
    )
