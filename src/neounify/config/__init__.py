"""Configuration as frozen dataclasses, checked on construction: model, flow, sampling, presets.

Foreign files become a ModelConfig at the edge, in `checkpoint/config_json.py`.
"""

from __future__ import annotations

from neounify.config.capabilities import Capability
from neounify.config.model import (
    CheckpointDefaults,
    FlowConfig,
    ImageHead,
    MlpConfig,
    ModelConfig,
    NoiseScaleMode,
    VideoConfig,
    VideoDefaults,
)
from neounify.config.sampling import Constraint, ConstraintFactory, TextSampling
from neounify.deprecation import moved

__all__ = [
    "Capability",
    "CheckpointDefaults",
    "Constraint",
    "ConstraintFactory",
    "FlowConfig",
    "ImageHead",
    "MlpConfig",
    "ModelConfig",
    "NoiseScaleMode",
    "TextSampling",
    "VideoConfig",
    "VideoDefaults",
]

__getattr__ = moved(__name__, __name__, {"SamplingConfig": "CheckpointDefaults"})
