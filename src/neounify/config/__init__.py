"""Configuration as frozen dataclasses, checked on construction: model, flow, sampling, presets.

Foreign files become a ModelConfig at the edge, in `checkpoint/config_json.py`.
"""

from __future__ import annotations

from neounify.config.flow import FlowConfig, NoiseScaleMode
from neounify.config.model import ImageHead, MlpConfig, ModelConfig
from neounify.config.sampling import CheckpointDefaults, Constraint, ConstraintFactory, TextSampling
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
