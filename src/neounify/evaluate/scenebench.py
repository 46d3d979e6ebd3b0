"""Deprecated: this package is `neounify.scenes.bench` now."""

from neounify.deprecation import moved

__getattr__ = moved(__name__, "neounify.scenes.bench")
