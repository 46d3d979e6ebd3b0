"""Configuration as frozen dataclasses, checked on construction: model, flow, sampling, presets.

Foreign files become a ModelConfig at the edge, in `checkpoint/config_json.py`.
"""

from __future__ import annotations

from neounify.config.flow import FlowConfig, NoiseScaleMode
from neounify.config.model import ImageHead, MlpConfig, ModelConfig
from neounify.config.sampling import CheckpointDefaults
from neounify.deprecation import moved

__all__ = [
    "CheckpointDefaults",
    "FlowConfig",
    "ImageHead",
    "MlpConfig",
    "ModelConfig",
    "NoiseScaleMode",
]

__getattr__ = moved(__name__, __name__, {"SamplingConfig": "CheckpointDefaults"})
