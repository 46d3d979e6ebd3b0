"""Replicas of the server behind one address, on one or many machines, by Ray Serve."""

from neounify.serve.replicas.running import run
from neounify.serve.replicas.settings import ReplicaError, ReplicaSettings

__all__ = ["ReplicaError", "ReplicaSettings", "run"]
