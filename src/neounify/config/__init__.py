"""Configuration as frozen dataclasses, checked on construction: model, flow, sampling, presets.

Foreign files become a ModelConfig at the edge, in `checkpoint/config_json.py`.
"""

from __future__ import annotations

import warnings
from typing import Any

from neounify.config.flow import FlowConfig, NoiseScaleMode
from neounify.config.model import ImageHead, MlpConfig, ModelConfig
from neounify.config.sampling import CheckpointDefaults

__all__ = [
    "CheckpointDefaults",
    "FlowConfig",
    "ImageHead",
    "MlpConfig",
    "ModelConfig",
    "NoiseScaleMode",
]

_RENAMED = {"SamplingConfig": "CheckpointDefaults"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        better = _RENAMED[name]
        warnings.warn(
            f"neounify.config.{name} is now called {better}", DeprecationWarning, stacklevel=2
        )
        return globals()[better]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
