"""Families of checkpoints as data: what their published configs leave unsaid.

A family is an entry here, a table of tensor names (`checkpoint/names.py`), a template
(`text/forms.py`) and perhaps a head (`model/`). Layers, flow and pipeline read fields of the
config and never its family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from neounify.config.model import (
    CheckpointDefaults,
    FlowConfig,
    VideoConfig,
    VideoDefaults,
)
from neounify.errors import ConfigError

ConfigForm = Literal["neo_chat", "qwen3"]


@dataclass(frozen=True)
class Family:
    """What all checkpoints of a family share."""

    title: str
    """Name in messages."""
    profile: Mapping[str, Any]
    """Fields of ModelConfig."""
    config_form: ConfigForm = "neo_chat"
    """The `model_type` of its config.json: its own, or that of the model it began with."""
    base: str = ""
    """Model whose config.json and tokenizer published folders need; "": they have their own."""
    finished_file: str = ""
    """Empty file that its trainer writes into a folder last, and its loader needs; "": none."""


SENSENOVA_U1 = "sensenova-u1"
PIXELUMM = "pixelumm"

FAMILIES: Mapping[str, Family] = {
    SENSENOVA_U1: Family("SenseNova-U1", {}),
    PIXELUMM: Family(
        "PixelUMM",
        {
            "family": PIXELUMM,
            "template": "pixelumm",
            "capabilities": ("chat", "generate", "generate_video", "chat_video"),
            "rope_theta": 1e6,
            "rope_theta_hw": 1e4,
            "patch_size": 16,
            "merge": 1,
            "patch_embed": "linear",
            "und_pixels": "symmetric",
            "image_head": "linear",
            "video": VideoConfig(tube_frames=4, und=True, position_fps=24.0),
            "flow": FlowConfig(
                noise_scale=1.0,
                noise_scale_mode="fixed",
                noise_scale_embedding=False,
                time_embedding=False,
                unread_time_embedder=True,
                noise_draw="tokens",
                t_eps_training=0.05,
                t_eps_sampling=0.05,
                first_time=0.001,
                guidance_end_open=True,
                unipc_grid=1000,
                restart_solver=False,
            ),
            "sampling": CheckpointDefaults(
                image_size=(832, 480),
                chat_min_pixels=56**2,
                chat_max_pixels=2_560_000,
                steps=50,
                guidance=3.5,
                shift=3.0,
                solver="dpm2m",
                video=VideoDefaults(dpm_steps=50),
            ),
        },
        config_form="qwen3",
        base="Qwen3-8B",
        finished_file="__SAVE_COMPLETE",
    ),
}
"""Families by the name that `ModelConfig.family` has."""


def family_named(name: str) -> Family:
    """The family of a name. Raises ConfigError."""
    if name not in FAMILIES:
        raise ConfigError(f"neounify.family {name!r} is unknown: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def title_of(family: str) -> str:
    """The name of a family in messages."""
    return FAMILIES[family].title if family in FAMILIES else family
