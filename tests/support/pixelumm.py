"""Small models of the second family, with the tokens that its prompts need."""

from __future__ import annotations

from pathlib import Path

from neounify.checkpoint import save_model
from neounify.config import CheckpointDefaults, ModelConfig, VideoDefaults
from neounify.config.families import FAMILIES, PIXELUMM
from neounify.config.presets import TINY
from neounify.text import Tokenizer, byte_tokenizer
from neounify.text.forms import TEMPLATES
from support.models import random_model

CONFIG = TINY.replace(
    **FAMILIES[PIXELUMM].profile,
    flow_head_width=4096,
    vision_hidden_size=1024,
)
SMALL = CONFIG.replace(
    sampling=CheckpointDefaults(
        image_size=(64, 48),
        chat_min_pixels=32**2,
        chat_max_pixels=64**2,
        steps=3,
        guidance=3.5,
        solver="dpm2m",
        video=VideoDefaults(size=(64, 48), frames=8, steps=3),
    )
)
"""Images of a dozen tokens, in a few steps."""


def vision_tokenizer(root: Path) -> Tokenizer:
    """A byte tokenizer with the marks of images of Qwen3, from a folder."""
    tokens = TEMPLATES["pixelumm"].tokens
    byte_tokenizer(required=tokens).save(root)
    return Tokenizer.from_folder(root, tokens)


def saved(folder: Path, config: ModelConfig = SMALL, seed: int = 0) -> Path:
    """A checkpoint folder of random weights, with its tokenizer."""
    tokenizer = vision_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    save_model(random_model(config, seed), folder, tokenizer=tokenizer)
    return folder
