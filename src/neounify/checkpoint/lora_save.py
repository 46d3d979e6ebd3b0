"""Deprecated: `convert_lora` is in `neounify.lora` now."""

from neounify.deprecation import moved

__getattr__ = moved(__name__, "neounify.lora", {"convert_lora": "convert_lora"})
