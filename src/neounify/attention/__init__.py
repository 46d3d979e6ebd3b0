"""Joint attention of the streams: a plan per call of the model, by a backend chosen once."""

from neounify.attention.backends import (
    BACKENDS,
    AttentionBackend,
    check_backend,
    copied_tokens,
    select,
    select_for,
)
from neounify.attention.blocks import AttentionPlan, Caches

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionPlan",
    "Caches",
    "check_backend",
    "copied_tokens",
    "select",
    "select_for",
]
