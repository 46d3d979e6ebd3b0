"""Configuration as frozen dataclasses, checked on construction: model, flow, sampling, presets.

Foreign files become a ModelConfig at the edge, in `checkpoint/config_json.py`.
"""

from __future__ import annotations

from neounify.config.model import (
    CheckpointDefaults,
    FlowConfig,
    ImageHead,
    MlpConfig,
    ModelConfig,
    NoiseScaleMode,
)
from neounify.config.sampling import Constraint, ConstraintFactory, TextSampling
from neounify.deprecation import moved

__all__ = [
    "CheckpointDefaults",
    "Constraint",
    "ConstraintFactory",
    "FlowConfig",
    "ImageHead",
    "MlpConfig",
    "ModelConfig",
    "NoiseScaleMode",
    "TextSampling",
]

__getattr__ = moved(__name__, __name__, {"SamplingConfig": "CheckpointDefaults"})
