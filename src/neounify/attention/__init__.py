"""Joint attention of the streams: a plan per call of the model, by a backend chosen once."""

from neounify.attention.plan import AttentionPlan, Caches
from neounify.attention.select import BACKENDS, AttentionBackend, select, select_for

__all__ = ["BACKENDS", "AttentionBackend", "AttentionPlan", "Caches", "select", "select_for"]
